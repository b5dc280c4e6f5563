"""A proxy for tests between an S3 client and its server, with a slow link and answers that fail.

    with FaultyProxy("http://127.0.0.1:8333", delay=0.05) as proxy:
        proxy.fail("truncated", path="train-000001.tar")
        proxy.fail_at_random(seed=0, count=200, ratio=0.1)
        ...  # with AWS_ENDPOINT_URL set to proxy.url
        print(proxy.injected, proxy.traffic)

Requests are forwarded with the client's own Host header, so their signatures stay valid.
"""

import io
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np

_STATUSES = {  # kind → status, code and message of S3's answer
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
KINDS = (
    *_STATUSES,
    "reset",  # instead of an answer
    "reset in body",
    "stall",  # in the body, and then a reset
    "truncated",  # the connection is closed before all announced bytes were sent
    "short",  # fewer bytes than the client asked for are announced and sent
    "wrong bytes",  # one byte of the body is inverted
)
_CHUNK_BYTES = 1 << 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Fault:
    """A fault of one request. kind: one of KINDS. place: 0 to 1, where in the body it happens."""

    kind: str
    place: float = 0.5

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass
class Traffic:
    """The requests for an object, and the bytes of bodies that were sent to clients."""

    requests: int = 0
    bytes: int = 0


class FaultyProxy:
    """A context manager that runs the proxy in threads of this process.

    upstream: the server's URL. delay: seconds added to each request. bytes_per_second: of the link that all
    connections share. stall_seconds: the length of a stall. url: the proxy's URL. traffic: by path, such as
    /bucket/object. injected: the number of faults so far, by kind.
    """

    def __init__(
        self,
        upstream: str,
        *,
        delay: float = 0.0,
        bytes_per_second: float = float("inf"),
        stall_seconds: float = 60.0,
        address: str = "127.0.0.1",
    ):
        self.upstream = urlsplit(upstream).netloc
        self.delay, self.bytes_per_second, self.stall_seconds = delay, bytes_per_second, stall_seconds
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self.injected: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._single: list[tuple[str, Fault]] = []
        self._random: list[Fault] = []
        self._ratio, self._path, self._rng = 0.0, "", np.random.default_rng(0)
        self._link_is_free_at = 0.0
        self._is_up, self._is_closing = threading.Event(), threading.Event()
        self._is_up.set()
        self._is_silent = False
        self._server = _Server(self, address)
        self.url = f"http://{address}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        self._is_up.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()

    @property
    def connections(self) -> int:
        """The number of clients' connections that are open."""
        return len(self._server.sockets)

    @property
    def bytes_sent(self) -> int:
        """The bytes of all bodies that were sent to clients."""
        return sum(each.bytes for each in list(self.traffic.values()))

    @property
    def requests(self) -> int:
        """The number of all requests."""
        return sum(each.requests for each in list(self.traffic.values()))

    @property
    def pending(self) -> int:
        """The number of faults that were ordered and have not been injected yet."""
        return len(self._single) + len(self._random)

    def fail(self, kind: str, path: str = "", times: int = 1, place: float = 0.5) -> None:
        """Give a fault to each of the next `times` GET requests whose path matches the pattern `path`."""
        with self._lock:
            self._single += [(path, Fault(kind, place))] * times

    def fail_at_random(
        self, seed: int, count: int, ratio: float, kinds: Sequence[str] = KINDS, path: str = ""
    ) -> None:
        """Give faults to a share `ratio` of the GET requests whose path matches `path`, `count` in all.

        Kinds are equally frequent. The seed determines the faults, their order, and how many requests lie
        between them.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(count)
        faults = [Fault(kinds[number % len(kinds)], rng.uniform()) for number in order]
        with self._lock:
            self._random, self._ratio, self._path, self._rng = faults, ratio, path, rng

    @contextmanager
    def outage(self, silent: bool = False) -> Iterator[None]:
        """Break the link during the block.

        Connections are reset, or, if `silent`, nothing is sent until the end of the block.
        """
        self._is_silent = silent
        self._is_up.clear()
        if not silent:
            self._server.cut()
        try:
            yield
        finally:
            self._is_up.set()

    def outage_for(self, seconds: float, silent: bool = False) -> threading.Thread:
        """Break the link for some seconds, in the background; return the thread, which ends with it."""

        def break_link() -> None:
            with self.outage(silent):
                self._is_closing.wait(seconds)

        thread = threading.Thread(target=break_link, daemon=True)
        thread.start()
        return thread

    def take_fault(self, path: str) -> Fault | None:
        """Return the fault of a new GET request, or None."""
        with self._lock:
            for index, (pattern, fault) in enumerate(self._single):
                if re.search(pattern, path):
                    del self._single[index]
                    return fault
            if self._random and re.search(self._path, path) and self._rng.uniform() < self._ratio:
                return self._random.pop()
        return None

    def count(self, path: str, *, requests: int = 0, size: int = 0) -> None:
        with self._lock:
            self.traffic[path].requests += requests
            self.traffic[path].bytes += size

    def count_fault(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def pass_link(self, size: int) -> bool:
        """Wait until `size` bytes have passed the link; return False if the link is broken."""
        if not self._is_up.is_set():
            if not self._is_silent:
                return False
            self._is_up.wait()
        if self.bytes_per_second < float("inf"):
            with self._lock:
                begin = max(time.monotonic(), self._link_is_free_at)
                self._link_is_free_at = begin + size / self.bytes_per_second
                pause = self._link_is_free_at - time.monotonic()
            self._is_closing.wait(pause)
        return not self._is_closing.is_set()

    def stall(self) -> None:
        self._is_closing.wait(self.stall_seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy, address: str):
        self.proxy = proxy
        self.sockets: set[socket.socket] = set()
        super().__init__((address, 0), _Handler)

    def cut(self) -> None:
        """Close all connections."""
        for connection in list(self.sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients close connections whenever they like, and so does `cut`."""


class _Handler(BaseHTTPRequestHandler):
    """Relays the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.server.sockets.add(self.connection)
        self.upstream = HTTPConnection(self.proxy.upstream)

    def finish(self) -> None:
        self.server.sockets.discard(self.connection)
        self.upstream.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def relay(self) -> None:
        path, proxy = unquote(urlsplit(self.path).path), self.proxy
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.count(path, requests=1)
        time.sleep(proxy.delay)
        if not proxy.pass_link(0):
            return self._reset()
        fault = proxy.take_fault(path) if self.command == "GET" else None
        if fault and fault.kind in _STATUSES:
            proxy.count_fault(fault.kind)
            return self._refuse(path, *_STATUSES[fault.kind])
        if fault and fault.kind == "reset":
            proxy.count_fault(fault.kind)
            return self._reset()
        try:
            answer = self._ask(content)
        except (OSError, HTTPException):  # the server has closed an idle connection
            self.upstream.close()
            answer = self._ask(content)
        self._answer(path, answer, fault)
        answer.read()  # so that the next request can be sent

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 (names that the base class looks up)

    def _ask(self, content: bytes) -> HTTPResponse:
        """Send the request to the server."""
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":  # which BaseHTTPRequestHandler has answered
                self.upstream.putheader(name, value)
        self.upstream.endheaders(content)
        return self.upstream.getresponse()

    def _answer(self, path: str, answer: HTTPResponse, fault: Fault | None) -> None:
        """Send the server's answer to the client, with its fault."""
        body: IO[bytes] = answer
        length = answer.length
        if self.command != "HEAD" and length is None:  # it is chunked
            content = answer.read()
            body, length = io.BytesIO(content), len(content)
        if self.command == "HEAD":
            length = int(answer.headers.get("Content-Length", 0))
        assert length is not None
        cut = int(fault.place * length) if fault else length
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(cut if fault and fault.kind == "short" else length))
        self.end_headers()
        if fault:
            self.proxy.count_fault(fault.kind)
            self._send_faulty(path, body, length, cut, fault.kind)
        elif self.command != "HEAD":
            self._send(path, body, length)

    def _send_faulty(self, path: str, body: IO[bytes], length: int, cut: int, kind: str) -> None:
        if not self._send(path, body, cut):
            return
        if kind == "wrong bytes":
            if byte := body.read(1):
                self._send(path, io.BytesIO(bytes([byte[0] ^ 0xFF])), 1)
            self._send(path, body, length - cut - len(byte))
            return
        if kind == "stall":
            self.proxy.stall()
        if kind in ("reset in body", "stall"):
            self._reset()
            return
        self.upstream.close()  # with the rest of the body
        self.close_connection = kind == "truncated"

    def _send(self, path: str, body: IO[bytes], size: int) -> bool:
        """Send `size` bytes of a body; return False if the connection is broken."""
        while size:
            chunk = body.read(min(size, _CHUNK_BYTES))
            if not chunk or not self.proxy.pass_link(len(chunk)):
                self._reset()
                return False
            self.proxy.count(path, size=len(chunk))
            self.wfile.write(chunk)
            size -= len(chunk)
        return True

    def _refuse(self, path: str, status: int, code: str, message: str) -> None:
        """Answer with an error of S3."""
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
        content = f"{text}<Resource>{path}</Resource></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        """Close the connection at once, with a reset instead of an orderly end."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.sockets.discard(self.connection)
        self.rfile.close()  # so that nothing holds the socket open
        self.connection.close()
