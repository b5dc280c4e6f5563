"""A run reports its progress to people and to Prometheus."""

import socket
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.packing import exporter, progress
from pipeline.packing.executors import Counts
from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError
from tests.helpers import free_port
from tools.make_shards import main


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, which the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))  # only for this module
    return now


def test_the_rate_and_the_time_left_are_those_of_this_run(clock):
    shown = Progress()
    shown.begin(total=10_000, before=4000)
    assert (shown.images_per_second, shown.seconds_left) == (0, float("inf"))
    clock[0] += 10
    shown.show(Counts(1000, 25_000_000, 3))
    assert shown.done == 5000
    assert shown.images_per_second == 100
    assert shown.seconds_left == 50
    assert str(shown) == "5,000 of 10,000 images, 25.0 MB, 3 rejected, 100 images/s, 50 s left"


def test_the_rate_is_that_of_the_last_half_minute(clock):
    shown = Progress()
    shown.begin(total=10**6, before=0)
    for second in range(1, 101):
        clock[0] += 1
        shown.show(Counts(second * 100 if second <= 50 else 5000 + (second - 50) * 10))
    assert shown.images_per_second == 10


def test_without_a_terminal_a_line_is_printed_every_ten_seconds(clock, capsys):
    with Progress() as shown:
        shown.begin(total=1000, before=0)
        for _ in range(125):  # 25 s
            clock[0] += 0.2
            shown.show(Counts(shown.counts.images + 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("packing: ") and line.endswith(" left") for line in lines)
    assert "50 of 1,000 images" in lines[0]


def test_a_terminal_shows_a_progress_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress() as shown:
        shown.begin(total=1000, before=0)
        clock[0] += 20
        shown.show(Counts(100, 5_000_000, 1))
        bar = shown._bar.get_renderable()
        assert (shown._bar.tasks[0].completed, shown._bar.tasks[0].total) == (100, 1000)
        assert "100 of 1,000 images" in shown._bar.tasks[0].description
    assert bar is not None
    assert "packing: " not in capsys.readouterr().err


def test_the_metrics_have_the_same_figures(clock):
    shown, port = Progress(), free_port()
    shown.begin(total=1000, before=500)
    clock[0] += 10
    shown.show(Counts(100, 2000, 7))
    with exporter.serve(shown, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            families = {
                family.name: family for family in text_string_to_metric_families(answer.read().decode())
            }
        with pytest.raises(PackingError, match="in use: choose another"), exporter.serve(shown, port):
            pass
    ours = {name: family for name, family in families.items() if name.startswith("alexnet_pack_")}
    assert {name: (family.type, family.samples[0].value) for name, family in ours.items()} == {
        "alexnet_pack_images": ("counter", 100),
        "alexnet_pack_bytes": ("counter", 2000),
        "alexnet_pack_rejected": ("counter", 7),
        "alexnet_pack_planned_images": ("gauge", 1000),
        "alexnet_pack_progress_ratio": ("gauge", 0.6),
        "alexnet_pack_left_seconds": ("gauge", 40),
    }
    assert "process_resident_memory_bytes" in families
    with socket.create_server(("", port)):  # the port is free again
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_metrics_are_served_at_one_address(address):
    port = free_port()
    other = "127.0.0.1" if address == "::1" else "::1"
    with exporter.serve(Progress(), port, address):
        url = f"http://[{address}]:{port}" if address == "::1" else f"http://{address}:{port}"
        with urllib.request.urlopen(f"{url}/metrics?name=value", timeout=10) as response:
            assert response.status == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port))


def test_an_address_that_cannot_be_used_is_named():
    refusal = pytest.raises(
        PackingError, match=r"--metrics-address nowhere.invalid .*: choose another address"
    )
    with refusal, exporter.serve(Progress(), free_port(), "nowhere.invalid"):
        pass


def test_a_metrics_port_in_use_is_refused_in_one_line(pictures, call, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = call(main, "--input", pictures, "--out", tmp_path / "out", "--metrics-port", port)
    assert run.returncode == 1
    assert run.stderr.startswith("make-shards: ")
    assert run.stderr.count("\n") == 1
    assert port in run.stderr
    assert not (tmp_path / "out").exists()
