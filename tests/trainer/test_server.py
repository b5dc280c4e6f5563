"""What the server of a process answers."""

import urllib.error
import urllib.request

import pytest
import torch

from trainer import server as module
from trainer.meter import Interval
from trainer.metrics import Metrics
from trainer.server import MetricsServer


@pytest.fixture
def served():
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield metrics, f"http://127.0.0.1:{server.port}"
    server.close()


def get(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


def test_metrics_are_served_as_they_stand(served):
    metrics, url = served
    metrics.images["train"].inc(1280)
    assert 'alexnet_images_total{phase="train"} 1280.0' in get(f"{url}/metrics").splitlines()


def test_health_follows_progress(served, monkeypatch):
    _, url = served
    assert get(f"{url}/healthz") == "ok\n"
    monkeypatch.setattr(module, "STALLED_SECONDS", 0.0)
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{url}/healthz")
    assert error.value.code == 503
    assert "no progress" in error.value.read().decode()


def test_the_live_page_is_there_before_the_first_interval_and_follows_it(served):
    metrics, url = served
    assert "starting" in get(url)
    interval = Interval(
        10, 1280, loss=2.5, error=0.5, seconds=2.0, wait_seconds=0.1, busy_seconds=1.9, ready=9
    )
    metrics.harvested(interval, 0.01, 1.0, torch.device("cpu"))
    assert "640.0" in get(url)


def test_a_page_may_load_nothing_from_elsewhere(served):
    policy = urllib.request.urlopen(served[1], timeout=10).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("path", ["/../etc/passwd", "/metrics/", "/live.html", "/?x=1"])
def test_nothing_else_is_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(served[1] + path)
    assert error.value.code == 404


def test_a_port_in_use_is_an_error(served):
    port = int(served[1].rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        MetricsServer(Metrics(), "127.0.0.1", port)
