"""The proxy's own faults, as a plain HTTP client sees them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.remote.faults import KINDS
from tests.remote.faulty_proxy import FaultyProxy

CONTENT = bytes(range(256)) * 1_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server with two objects of the same content."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(CONTENT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def get(proxy: FaultyProxy, path: str = "/one") -> tuple[int, bytes]:
    """Return the status and the body of a request on its own connection."""
    connection = HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_faults_bodies_pass_and_are_counted_by_object(server):
    with FaultyProxy(server) as proxy:
        assert get(proxy) == get(proxy) == get(proxy, "/two") == (200, CONTENT)
        assert get(proxy, "/three")[0] == 404
        assert {path: each.requests for path, each in proxy.traffic.items()} == {
            "/one": 2,
            "/two": 1,
            "/three": 1,
        }
        assert proxy.traffic["/one"].bytes == 2 * len(CONTENT)


def test_a_connection_is_kept_for_several_requests(server):
    with FaultyProxy(server) as proxy:
        connection = HTTPConnection(proxy.url.removeprefix("http://"))
        for method, size in (("HEAD", 0), ("GET", len(CONTENT))):
            connection.request(method, "/one")
            answer = connection.getresponse()
            assert int(answer.headers["Content-Length"]) == len(CONTENT)
            assert len(answer.read()) == size
        assert len(proxy.link.sockets) == 1
        connection.close()


@pytest.mark.parametrize(
    ("kind", "status", "code"), [("error", 500, b"InternalError"), ("slow down", 503, b"SlowDown")]
)
def test_an_error_status_is_sent_instead_of_the_object(server, kind, status, code):
    with FaultyProxy(server) as proxy:
        proxy.faults.fail(kind)
        got, body = get(proxy)
        assert got == status
        assert code in body
        assert get(proxy) == (200, CONTENT)
        assert proxy.faults.injected == {kind: 1}


@pytest.mark.parametrize("kind", ["reset", "reset in body", "stall"])
def test_a_connection_is_reset(server, kind):
    with FaultyProxy(server, stall_seconds=0.3) as proxy:
        proxy.faults.fail(kind)
        begun = time.monotonic()
        with pytest.raises(ConnectionResetError):
            get(proxy)
        assert time.monotonic() - begun >= 0.3 * (kind == "stall")
        assert proxy.traffic["/one"].bytes == (0 if kind == "reset" else len(CONTENT) // 2)


def test_a_body_is_truncated_shortened_or_altered(server):
    with FaultyProxy(server) as proxy:
        proxy.faults.fail("truncated", place=0.25)
        with pytest.raises(IncompleteRead) as error:
            get(proxy)
        assert error.value.partial == CONTENT[: len(CONTENT) // 4]
        proxy.faults.fail("short", place=0.25)
        assert get(proxy) == (200, CONTENT[: len(CONTENT) // 4])
        proxy.faults.fail("wrong bytes", place=0.25)
        body = get(proxy)[1]
        different = [index for index, byte in enumerate(CONTENT) if body[index] != byte]
        assert len(body) == len(CONTENT)
        assert different == [len(CONTENT) // 4]


def test_a_fault_waits_for_a_request_of_its_object(server):
    with FaultyProxy(server) as proxy:
        proxy.faults.fail("error", path="two", times=2)
        assert [get(proxy, path)[0] for path in ("/one", "/two", "/one", "/two", "/two")] == [
            200,
            500,
            200,
            500,
            200,
        ]
        assert proxy.faults.pending == 0


def test_random_faults_are_of_all_kinds_and_follow_the_seed(server):
    def faults(seed: int) -> list[tuple[int, str]]:
        with FaultyProxy(server) as proxy:
            proxy.faults.fail_at_random(seed, count=3 * len(KINDS), ratio=0.5)
            taken = [(number, proxy.faults.take_fault("/one")) for number in range(200)]
            assert not proxy.faults.pending
            return [(number, fault.kind) for number, fault in taken if fault]

    assert Counter(kind for _, kind in faults(0)) == dict.fromkeys(KINDS, 3)
    assert 40 <= faults(0)[-1][0] <= 70  # 27 faults in half of the requests
    assert faults(0) == faults(0)
    assert faults(0) != faults(1)


def test_delay_and_bandwidth_are_kept_by_all_connections_together(server):
    with FaultyProxy(server, delay=0.2) as proxy:
        begun = time.monotonic()
        get(proxy)
        assert time.monotonic() - begun >= 0.2
    with FaultyProxy(server, bytes_per_second=2 * len(CONTENT)) as proxy:
        begun = time.monotonic()
        clients = [threading.Thread(target=get, args=(proxy,)) for _ in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert time.monotonic() - begun >= 1


def test_during_an_outage_connections_are_reset(server):
    with FaultyProxy(server) as proxy:
        connection = HTTPConnection(proxy.url.removeprefix("http://"))
        connection.request("GET", "/one")
        assert connection.getresponse().read() == CONTENT
        with proxy.link.outage():
            with pytest.raises(OSError, match=r"reset|closed|Broken pipe"):
                get(proxy)
            with suppress(BrokenPipeError):
                connection.request("GET", "/one")
            with pytest.raises((OSError, HTTPException)):
                connection.getresponse()
        assert get(proxy) == (200, CONTENT)


def test_during_a_silent_outage_requests_wait(server):
    with FaultyProxy(server) as proxy:
        begun = time.monotonic()
        outage = proxy.link.outage_for(0.5, silent=True)
        assert get(proxy) == (200, CONTENT)
        assert time.monotonic() - begun >= 0.5
        outage.join()
