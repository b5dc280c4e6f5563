"""Metrics as a scraper sees them."""

import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from trainer import metrics as module
from trainer.meter import Interval
from trainer.metrics import Metrics, MetricsServer

# The table of the design: names as exposed, with their types.
DESIGN = {
    "alexnet_images": "counter",
    "alexnet_step_seconds": "histogram",
    "alexnet_input_wait_seconds": "histogram",
    "alexnet_gpu_busy_seconds": "counter",
    "alexnet_activity_seconds": "counter",
    "alexnet_images_per_second": "gauge",
    "alexnet_step": "gauge",
    "alexnet_epoch": "gauge",
    "alexnet_progress_ratio": "gauge",
    "alexnet_loss": "gauge",
    "alexnet_learning_rate": "gauge",
    "alexnet_grad_scale": "gauge",
    "alexnet_skipped_steps": "counter",
    "alexnet_eval_error_ratio": "gauge",
    "alexnet_checkpoint_timestamp_seconds": "gauge",
    "alexnet_checkpoint_seconds": "histogram",
    "alexnet_gpu_memory_peak_bytes": "gauge",
    "alexnet_jpeg_engine_utilization_ratio": "gauge",
    "alexnet_gpu_utilization_ratio": "gauge",
}


@pytest.fixture
def served():
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield metrics, f"http://127.0.0.1:{server.port}"
    server.close()


def get(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


def test_the_metrics_of_the_design_are_served(served):
    metrics, url = served
    metrics.evaluated("centre", loss=1.5, top1_error=0.4, top5_error=0.2)
    families = {family.name: family for family in text_string_to_metric_families(get(f"{url}/metrics"))}
    assert {name: families[name].type for name in DESIGN if name in families} == DESIGN


def test_an_interval_and_an_evaluation_reach_the_scraper(served):
    metrics, url = served
    interval = Interval(
        steps=10, images=1280, loss=2.5, error=0.5, seconds=2.0, wait_seconds=0.1, busy_seconds=1.8
    )
    metrics.harvested(interval, 0.01, 1.0, torch.device("cpu"))
    metrics.evaluated("ten", loss=1.5, top1_error=0.4, top5_error=0.2)
    metrics.images["train"].inc(1280)
    text = get(f"{url}/metrics")
    for line in (
        'alexnet_images_total{phase="train"} 1280.0',
        "alexnet_images_per_second 640.0",
        'alexnet_loss{phase="train"} 2.5',
        "alexnet_gpu_busy_seconds_total 1.8",
        'alexnet_eval_error_ratio{k="5",protocol="ten"} 0.2',
    ):
        assert line in text.splitlines()


def test_each_halving_of_the_scale_counts_as_a_skipped_step():
    metrics = Metrics()
    interval = Interval(1, 1, 1.0, 0.0, 1.0, 0.0, 1.0)
    for scale in (65536.0, 65536.0, 16384.0, 32768.0, 16384.0):
        metrics.harvested(interval, 0.01, scale, torch.device("cpu"))
    assert metrics.registry.get_sample_value("alexnet_skipped_steps_total") == 3


def test_health_follows_progress(served, monkeypatch):
    _, url = served
    assert get(f"{url}/healthz") == "ok\n"
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.0)
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{url}/healthz")
    assert error.value.code == 503
    assert "no progress" in error.value.read().decode()


def test_nothing_else_is_served(served):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{served[1]}/../etc/passwd")
    assert error.value.code == 404


def test_a_port_in_use_is_an_error(served):
    port = int(served[1].rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        MetricsServer(Metrics(), "127.0.0.1", port)
