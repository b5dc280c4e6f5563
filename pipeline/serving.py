"""Serve a few pages over HTTP, with limits on what a client can make the server do.

It reads only the head of a request (request line and headers), at most HEAD_BYTES within HEAD_SECONDS, and
uses only the method and the path. It serves up to MAX_CLIENTS at a time, and closes further connections.
These limits, which SECURITY.md promises, are nearly all of this module: prometheus_client's WSGI application
has none, so serving it with wsgiref would need them all the same.
"""

import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

HEAD_BYTES = 16384
HEAD_SECONDS = 5.0
RESPONSE_SECONDS = 30.0  # time limit for sending the response to a client
MAX_CLIENTS = 32
# A page may contain its own style and script, and sends requests to this server only.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
PLAIN = "text/plain; charset=utf-8"
Response = tuple[int, str, str]  # status, content type, text


def url_host(address: str) -> str:
    """Return the host part of a URL for an address: an IPv6 address is put in brackets."""
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


class PageServer:
    """Serves pages from its own thread until it is closed.

    pages: for each path, a function that returns the response. address: a host name, an IPv4 address, or an
    IPv6 address with or without brackets, of this machine; `::` means all its addresses, IPv4 and IPv6. port:
    0 lets the system choose one. Raises OSError if the address is not one of this machine's, or if the port
    is in use.
    """

    def __init__(self, pages: Mapping[str, Callable[[], Response]], address: str, port: int):
        def not_found() -> Response:
            return 404, PLAIN, f"not found; try {', '.join(pages)}\n"

        self.served = served = Counter[str]()  # how often a page was sent, by its path

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                self.rfile = BytesIO(_read_head(self.connection))
                self.connection.settimeout(RESPONSE_SECONDS)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                status, content_type, text = pages.get(path, not_found)()
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", _POLICY)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                    served[path] += path in pages

            do_HEAD = do_GET  # noqa: N815 – http.server's name

            def version_string(self) -> str:
                return "alexnet-train"  # hides the versions of Python and its server

            def log_message(self, *_: object) -> None:
                """Do not log requests: Prometheus sends one every few seconds."""

        self._server = _Server(_resolve(address, port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _resolve(address: str, port: int) -> tuple:
    """Return the socket address of a name or an address. Raises OSError."""
    bare = address.removeprefix("[").removesuffix("]")
    try:
        return socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4]
    except ValueError as error:  # a name that cannot be looked up at all
        raise OSError(None, f"not an address or a host name ({error})") from None


class _Server(ThreadingHTTPServer):
    """An HTTP server with one thread per client, which closes connections beyond MAX_CLIENTS."""

    daemon_threads = True
    allow_reuse_address = True  # allows a port in the state TIME_WAIT, but not one that is in use

    def __init__(self, address: tuple, handler: type[BaseHTTPRequestHandler]):
        self.address_family = socket.AF_INET6 if len(address) > 2 else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:  # by default, `::` excludes IPv4 on some systems
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def server_activate(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().server_activate()

    def process_request(self, request, client_address) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address) -> None:
        """Ignore the errors of connections to clients that are slow or have gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _read_head(connection: socket.socket) -> bytes:
    """Return the request line and the headers, or as much as the client sent or HEAD_BYTES allows.

    Raises TimeoutError if they have not arrived within HEAD_SECONDS.
    """
    head, end = b"", time.monotonic() + HEAD_SECONDS
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < HEAD_BYTES:
        connection.settimeout(max(end - time.monotonic(), 0.001))  # the limit is for the whole head
        part = connection.recv(HEAD_BYTES - len(head))
        if not part:
            break
        head += part
    return head
