"""A proxy for tests between an S3 client and its server, with a slow link and answers that fail.

    with FaultyProxy("http://127.0.0.1:8333", delay=0.05) as proxy:
        proxy.faults.fail("truncated", path="train-000001.tar")
        proxy.faults.fail_at_random(seed=0, count=200, ratio=0.1)
        ...  # with AWS_ENDPOINT_URL set to proxy.url
        print(proxy.faults.injected, proxy.traffic)

Requests are forwarded with the client's own Host header, so their signatures stay valid.
"""

import io
import socket
import struct
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any, Self
from urllib.parse import unquote, urlsplit

from tests.remote.faults import STATUSES, Fault, Faults
from tests.remote.link import Link

_CHUNK_BYTES = 1 << 16
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Traffic:
    """The requests for an object, and the bytes of bodies that were sent to clients."""

    requests: int = 0
    bytes: int = 0


class FaultyProxy:
    """A context manager that runs the proxy in threads of this process.

    upstream: the server's URL. delay: seconds added to each request. bytes_per_second: of the link that all
    connections share. stall_seconds: the length of a stall. url: the proxy's URL. faults: those of requests.
    link: between the proxy and its clients. traffic: by path, such as /bucket/object.
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
        self.upstream, self.stall_seconds = urlsplit(upstream).netloc, stall_seconds
        self.faults, self.link = Faults(), Link(delay, bytes_per_second)
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._lock = threading.Lock()
        self._server = _Server(self, address)
        self.url = f"http://{address}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.link.close()

    @property
    def bytes_sent(self) -> int:
        """The bytes of all bodies that were sent to clients."""
        return sum(each.bytes for each in list(self.traffic.values()))

    @property
    def requests(self) -> int:
        """The number of all requests."""
        return sum(each.requests for each in list(self.traffic.values()))

    def count(self, path: str, *, requests: int = 0, size: int = 0) -> None:
        with self._lock:
            self.traffic[path].requests += requests
            self.traffic[path].bytes += size


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy, address: str):
        self.proxy = proxy
        super().__init__((address, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients close connections whenever they like, and so does the link."""


class _Handler(BaseHTTPRequestHandler):
    """Relays the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.proxy.link.sockets.add(self.connection)
        self.upstream = HTTPConnection(self.proxy.upstream)

    def finish(self) -> None:
        self.proxy.link.sockets.discard(self.connection)
        self.upstream.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def relay(self) -> None:
        path, proxy = unquote(urlsplit(self.path).path), self.proxy
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.count(path, requests=1)
        time.sleep(proxy.link.delay)
        if not proxy.link.transmit(0):
            return self._reset()
        fault = proxy.faults.take_fault(path) if self.command == "GET" else None
        if fault and fault.kind in STATUSES:
            return self._refuse(path, *STATUSES[fault.kind])
        if fault and fault.kind == "reset":
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
            self.proxy.link.pause(self.proxy.stall_seconds)
        if kind in ("reset in body", "stall"):
            self._reset()
            return
        self.upstream.close()  # with the rest of the body
        self.close_connection = kind == "truncated"

    def _send(self, path: str, body: IO[bytes], size: int) -> bool:
        """Send `size` bytes of a body; return False if the connection is broken."""
        while size:
            chunk = body.read(min(size, _CHUNK_BYTES))
            if not chunk or not self.proxy.link.transmit(len(chunk)):
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
        self.proxy.link.sockets.discard(self.connection)
        self.rfile.close()  # so that nothing holds the socket open
        self.connection.close()
