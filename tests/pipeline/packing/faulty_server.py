"""An HTTP server that serves files, some of them with a fault."""

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, or calls a fault of `server.faults` instead."""

    protocol_version = "HTTP/1.1"
    server: "FaultyServer"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[self.path] += 1
        fault = self.server.faults.get(path)
        if fault is None or fault(self) is True:
            self.send(self.server.files[path]) if path in self.server.files else self.refuse(404)

    def send(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


Fault = Callable[[Handler], object]  # returns True if the file is to be served after all


class FaultyServer(ThreadingHTTPServer):
    """files, faults: by path. requests: the number of requests by path."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that give up are expected."""


@contextmanager
def serving(handler: type[Handler] = Handler) -> Iterator[FaultyServer]:
    with FaultyServer(handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def status(code: int, **headers: str) -> Fault:
    return lambda handler: handler.refuse(code, **headers)


def redirect(location: str | None = None) -> Fault:
    """Redirect to another URL, or to the same one."""
    return lambda handler: handler.refuse(302, Location=location or handler.path)


def cut(handler: Handler) -> None:
    """End the connection in the middle of the file."""
    content = handler.server.files[handler.path]
    handler.send(content[: len(content) // 2], len(content))
    handler.close_connection = True


def reset(handler: Handler) -> None:
    """Reset the connection in the middle of the file."""
    handler.send(b"abc", 1000)
    disconnect(handler)


def disconnect(handler: Handler) -> None:
    """Reset the connection."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # at once, although the handler has two more references


def silent(handler: Handler) -> None:
    """Accept the request, and never answer."""
    time.sleep(3)
    handler.close_connection = True


def stall(handler: Handler) -> None:
    """Stop in the middle of the file."""
    handler.send(b"abc", 1000)
    silent(handler)


def trickle(handler: Handler) -> None:
    """Send a byte from time to time."""
    handler.send(b"", 1000)
    for _ in range(100):
        handler.wfile.write(b"a")
        handler.wfile.flush()
        time.sleep(0.05)


def once(fault: Fault) -> Fault:
    """Apply a fault only to the first request."""
    left = [fault]
    return lambda handler: left.pop()(handler) if left else True
