"""Metrics as a scraper sees them."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from pipeline.remote.counters import Counters
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics

# All metrics: their names as exposed, and their types.
TYPES = {
    "alexnet_images": "counter",
    "alexnet_step_seconds": "histogram",
    "alexnet_input_wait_seconds": "histogram",
    "alexnet_gpu_busy_seconds": "counter",
    "alexnet_activity_seconds": "counter",
    "alexnet_images_per_second": "gauge",
    "alexnet_ceiling_images_per_second": "gauge",
    "alexnet_step": "gauge",
    "alexnet_epoch": "gauge",
    "alexnet_progress_ratio": "gauge",
    "alexnet_loss": "gauge",
    "alexnet_learning_rate": "gauge",
    "alexnet_grad_scale": "gauge",
    "alexnet_skipped_steps": "counter",
    "alexnet_unsound_intervals": "counter",
    "alexnet_eval_error_ratio": "gauge",
    "alexnet_checkpoint_timestamp_seconds": "gauge",
    "alexnet_checkpoint_seconds": "histogram",
    "alexnet_checkpoint_stall_seconds": "histogram",
    "alexnet_checkpoint_bytes": "gauge",
    "alexnet_checkpoint_failures": "counter",
    "alexnet_gpu_memory_peak_bytes": "gauge",
    "alexnet_gpu_memory_used_ratio": "gauge",
    "alexnet_jpeg_engine_utilization_ratio": "gauge",
    "alexnet_gpu_utilization_ratio": "gauge",
}


def test_every_metric_is_exposed_with_its_type():
    metrics = Metrics()
    metrics.record_evaluation("centre", loss=1.5, top1_error=0.4, top5_error=0.2)
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition())}
    assert {name: families[name].type for name in TYPES if name in families} == TYPES


def test_the_time_of_an_activity_is_counted_while_it_lasts(monkeypatch):
    clock = itertools.count(100.0)  # seconds; each look at it takes one
    monkeypatch.setattr("trainer.monitor.metrics.time", SimpleNamespace(monotonic=lambda: next(clock)))
    metrics = Metrics()

    def seconds() -> tuple[float, float]:
        return metrics.value("activity_seconds_total", activity="train"), metrics.value(
            "activity_seconds_total", activity="eval"
        )

    assert seconds() == (0, 0)
    with metrics.activity("train"):
        assert seconds()[0] > 0
    trained, _ = seconds()
    with metrics.activity("eval"):
        first, second = seconds(), seconds()
    assert first[0] == second[0] == trained
    assert 0 < first[1] < second[1]
    assert seconds() == seconds()


def test_an_interval_and_an_evaluation_reach_the_scraper():
    metrics = Metrics()
    interval = Interval(
        steps=10, images=1280, loss=2.5, error=0.5, seconds=2.0, wait_seconds=0.1, busy_seconds=1.8, ready=9
    )
    metrics.record_interval(interval, 0.01, 1.0, torch.device("cpu"))
    metrics.record_evaluation("ten", loss=1.5, top1_error=0.4, top5_error=0.2)
    metrics.images["train"].inc(1280)
    text = metrics.exposition()
    for line in (
        'alexnet_images_total{phase="train"} 1280.0',
        "alexnet_images_per_second 640.0",
        'alexnet_loss{phase="train"} 2.5',
        "alexnet_gpu_busy_seconds_total 1.8",
        'alexnet_eval_error_ratio{k="5",protocol="ten"} 0.2',
    ):
        assert line in text.splitlines()


def test_the_loss_is_not_exported_before_it_is_known():
    metrics = Metrics()
    assert "alexnet_loss{" not in metrics.exposition()
    metrics.record_evaluation("centre", loss=1.5, top1_error=0.4, top5_error=0.2)
    assert 'alexnet_loss{phase="eval"} 1.5' in metrics.exposition()
    assert 'alexnet_loss{phase="train"}' not in metrics.exposition()


def test_a_name_that_is_not_utf_8_is_exported_with_escapes():
    metrics = Metrics()
    metrics.describe({"run": "runs/caf\udce9"})
    assert r'run="runs/caf\\udce9"' in metrics.exposition().encode().decode()


def test_the_run_is_described_by_labels_that_every_prometheus_accepts():
    metrics = Metrics()
    metrics.describe({"recipe": "paper", "nvidia-dali-cuda130": "2.4.0"})
    assert 'alexnet_run_info{nvidia_dali_cuda130="2.4.0",recipe="paper"} 1.0' in metrics.exposition()


def test_a_cpu_has_no_gpu_gauges_and_unmeasured_ceilings_are_absent():
    metrics = Metrics()
    metrics.record_interval(Interval(1, 1, 1.0, 0.0, 1.0, 0.0, 1.0, 1), 0.01, 1.0, torch.device("cpu"))
    samples = [line for line in metrics.exposition().splitlines() if not line.startswith("#")]
    assert not [
        line for line in samples if line.startswith(("alexnet_gpu_m", "alexnet_gpu_u", "alexnet_jpeg"))
    ]
    assert not [line for line in samples if line.startswith("alexnet_ceiling")]
    metrics.record_ceiling("loader", 2000.0)
    assert 'alexnet_ceiling_images_per_second{path="loader"} 2000.0' in metrics.exposition()


NVML = {
    "alexnet_gpu_memory_used_ratio": ("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=30, total=40)),
    "alexnet_gpu_utilization_ratio": ("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=50, memory=1)),
    "alexnet_jpeg_engine_utilization_ratio": ("nvmlDeviceGetJpgUtilization", [25, 1000]),
}
EVERY = {"alexnet_gpu_memory_peak_bytes": 5.0} | dict(zip(NVML, (0.75, 0.5, 0.25), strict=True))


@pytest.fixture
def gpu(monkeypatch):
    """The gauges that are exposed for a GPU that NVML knows."""
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 5)
    monkeypatch.setattr("trainer.monitor.metrics._nvml_handle", lambda device: "handle")
    for function, answer in NVML.values():
        monkeypatch.setattr(pynvml, function, lambda handle, answer=answer: answer)
    metrics = Metrics()

    def served() -> dict[str, float]:
        metrics.record_interval(
            Interval(1, 1, 1.0, 0.0, 1.0, 0.0, 1.0, 1), 0.01, 1.0, torch.device("cuda", 0)
        )
        families = text_string_to_metric_families(metrics.exposition())
        samples = [sample for family in families for sample in family.samples]
        return {sample.name: sample.value for sample in samples if sample.labels == {"gpu": "0"}}

    return served


def failing(error: type[pynvml.NVMLError]) -> Callable:
    def fail(_):
        raise error(0)

    return fail


@pytest.mark.parametrize("error", pynvml.NVMLError.__subclasses__(), ids=lambda error: error.__name__)
def test_a_gauge_is_absent_while_nvml_does_not_report_its_value(gpu, monkeypatch, error):
    for gauge, (function, _) in NVML.items():
        assert gpu() == EVERY
        with monkeypatch.context() as patch:
            patch.setattr(pynvml, function, failing(error))
            assert gpu() == {name: value for name, value in EVERY.items() if name != gauge}


def test_without_nvml_a_gpu_has_only_torchs_gauge(gpu, monkeypatch):
    monkeypatch.setattr("trainer.monitor.metrics._nvml_handle", failing(pynvml.NVMLError_LibraryNotFound))
    assert gpu() == {"alexnet_gpu_memory_peak_bytes": 5.0}


def test_storage_is_exported_as_it_is_when_scraped():
    metrics, counters = Metrics(), Counters()
    assert metrics.value("storage_wait_seconds_total") == 0
    metrics.follow_storage(counters)
    counters.bytes_fetched, counters.shard_misses, counters.wait_seconds = 1000, 2, 1.5
    assert metrics.value("storage_bytes_total") == 1000
    assert metrics.value("storage_shard_lookups_total", result="miss") == 2
    assert metrics.value("storage_shard_lookups_total", result="hit") == 0
    assert metrics.storage_wait_seconds == metrics.value("storage_wait_seconds_total") == 1.5
