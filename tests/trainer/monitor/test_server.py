"""The responses of a process's server."""

import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

from pipeline import serving
from tests.helpers import DEADLINE_SECONDS, free_port, wait_until
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.monitor.server import MetricsServer, start_server
from trainer.processes.distributed import World
from trainer.processes.stop import StopRequest
from trainer.run import RunError
from trainer.settings import Settings, SettingsError

STALL_SECONDS = 900.0


@pytest.fixture
def served():
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0, STALL_SECONDS)
    yield metrics, f"http://127.0.0.1:{server.port}"
    server.close()


def get(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


def test_metrics_are_served_with_their_current_values(served):
    metrics, url = served
    metrics.images["train"].inc(1280)
    assert 'alexnet_images_total{phase="train"} 1280.0' in get(f"{url}/metrics").splitlines()


@pytest.mark.parametrize("scrapes", [0, 1, 2])
def test_a_prometheus_that_has_scraped_sees_the_last_values(scrapes):
    metrics = Metrics()
    server = MetricsServer(metrics, "127.0.0.1", 0, STALL_SECONDS)
    try:
        for _ in range(scrapes):  # one may be a user's
            get(f"http://127.0.0.1:{server.port}/metrics")
        wait_until(lambda: server.served["/metrics"] == scrapes)
        waiting = threading.Thread(target=server.wait_for_scrape, args=(StopRequest(),))
        waiting.start()
        if scrapes == 2:
            waiting.join(0.5)
            assert waiting.is_alive()
            get(f"http://127.0.0.1:{server.port}/metrics")
        waiting.join(DEADLINE_SECONDS)
        assert not waiting.is_alive()
    finally:
        server.close()


def test_a_request_to_stop_ends_the_wait_for_a_scrape():
    server, stop = MetricsServer(Metrics(), "127.0.0.1", 0, STALL_SECONDS), StopRequest()
    server.served["/metrics"] = 2
    stop.error = RunError("asked to stop")
    server.wait_for_scrape(stop)  # would take a minute
    server.close()


def test_health_follows_progress(served, monkeypatch):
    metrics, url = served
    metrics.record_interval(Interval(1, 1, 1.0, 0.0, 1.0, 0.0, 1.0, 1), 0.01, 1.0, torch.device("cpu"))
    assert get(f"{url}/healthz") == "ok\n"
    monkeypatch.setattr(metrics, "stalled_seconds", lambda: 0.7 * STALL_SECONDS)
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{url}/healthz")
    assert error.value.code == 503
    assert "no progress" in error.value.read().decode()


def test_the_live_page_is_served_before_the_first_interval_and_updated_after_it(served):
    metrics, url = served
    assert "starting" in get(url)
    interval = Interval(
        10, 1280, loss=2.5, error=0.5, seconds=2.0, wait_seconds=0.1, busy_seconds=1.9, ready=9
    )
    metrics.record_interval(interval, 0.01, 1.0, torch.device("cpu"))
    assert "640.0" in get(url)


def test_the_page_may_not_load_anything_from_other_hosts(served):
    policy = urllib.request.urlopen(served[1], timeout=10).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/?x=1", "/metrics?x=1&y", "/metrics?", "/healthz?a?b", "/?/nothing"])
def test_a_query_is_ignored(served, path, method):
    request = urllib.request.Request(served[1] + path, method=method)
    assert urllib.request.urlopen(request, timeout=10).status == 200


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("::", "[::1]"),
        ("[::]", "127.0.0.1"),
        ("localhost", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_server_binds_to_host_names_and_addresses_of_ipv4_and_ipv6(address, reached):
    server = MetricsServer(Metrics(), address, 0, STALL_SECONDS)
    try:
        assert get(f"http://{reached}:{server.port}/healthz") == "ok\n"
    finally:
        server.close()


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a..b", "x" * 300, "192.0.2.1", ":::", "a b"])
def test_an_unusable_address_is_refused_in_one_line(address):
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(SettingsError, match=r"--address .* --port \d+: \S") as error:
        start_server(Metrics(), Settings(address=address, port=free_port()), world)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "shown"), [("::", "[::]"), ("[::1]", "[::1]"), ("0.0.0.0", "0.0.0.0"), ("host", "host")]
)
def test_an_ipv6_address_has_brackets_in_a_url(address, shown):
    assert serving.url_host(address) == shown


@pytest.mark.parametrize("path", ["/../etc/passwd", "/metrics/", "/live.html", "/x?/metrics", "/%3Fx"])
def test_nothing_else_is_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(served[1] + path)
    assert error.value.code == 404


def test_a_port_in_use_is_an_error(served):
    port = int(served[1].rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        MetricsServer(Metrics(), "127.0.0.1", port, STALL_SECONDS)


def test_only_get_and_head_are_answered_and_head_has_no_body(served):
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(served[1], method=method), timeout=10)
        assert error.value.code == 501
    head = urllib.request.urlopen(urllib.request.Request(served[1], method="HEAD"), timeout=10)
    assert int(head.headers["Content-Length"]) > 1000
    assert head.read() == b""
    assert head.headers["Server"] == "alexnet-train"


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=60)


def ended(connection: socket.socket) -> bool:
    """Return whether the server closes a connection without a response."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_sends_slowly_is_disconnected(served, monkeypatch, capfd):
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.5)
    with connect(served[1]) as slow:
        slow.setblocking(False)
        begun = time.monotonic()
        while time.monotonic() < begun + 60:
            time.sleep(0.1)
            try:
                slow.send(b"G")
                if ended(slow):
                    break
            except BlockingIOError:
                continue  # nothing from the server yet
            except OSError:
                break
        else:
            pytest.fail("it was never disconnected")
    assert capfd.readouterr().err == ""


def test_clients_beyond_the_limit_are_disconnected_and_others_are_served(served, monkeypatch):
    monkeypatch.setattr(serving, "HEAD_SECONDS", 60.0)
    waiting = [connect(served[1]) for _ in range(serving.MAX_CLIENTS)]
    with connect(served[1]) as another:
        assert ended(another)
    for client in waiting:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.0 200 OK"
        client.close()


@pytest.mark.parametrize(
    ("address", "rank", "expected"),
    [("0.0.0.0", 0, "127.0.0.1"), ("::", 0, "::1"), ("127.0.0.1", 0, "127.0.0.1"), ("0.0.0.0", 1, None)],
)
def test_the_health_check_of_the_image_learns_the_address(tmp_path, monkeypatch, address, rank, expected):
    file, port = tmp_path / "address", free_port()
    monkeypatch.setattr("trainer.monitor.server.ADDRESS_FILE", file)
    monkeypatch.setenv("container", "oci")
    settings = Settings(address=address, port=port - rank)
    server = start_server(Metrics(), settings, World(rank, 2, rank, torch.device("cpu")))
    assert (file.read_text() if file.exists() else None) == (expected and f"{expected} {port}")
    server.close()
    assert not file.exists()
