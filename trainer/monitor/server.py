"""The HTTP server of a process: /metrics for Prometheus, /healthz for supervisors, and / for a browser.

It reads only the head of a request (request line and headers), at most HEAD_BYTES within HEAD_SECONDS, and
uses only the method and the path. It serves up to MAX_CLIENTS at a time, and closes further connections.
"""

import errno
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

from trainer.monitor.live import live_page
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World
from trainer.processes.watchdog import UNHEALTHY_FRACTION, allowed_seconds
from trainer.settings import Settings, SettingsError

HEAD_BYTES = 16384
HEAD_SECONDS = 5.0
RESPONSE_SECONDS = 30.0  # time limit for sending the response to a client
MAX_CLIENTS = 32
# The live page contains its own style and script, and sends requests to this server only.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
_PLAIN = "text/plain; charset=utf-8"
_Response = tuple[int, str, str]  # status, content type, text


class MetricsServer:
    """Serves from its own thread until it is closed. Raises OSError if the port is in use.

    port: port to bind to; 0 lets the system choose one. stall_seconds: time limit of the watchdog; after
    UNHEALTHY_FRACTION of the time that the watchdog allows without progress, /healthz responds with 503.
    """

    def __init__(self, metrics: Metrics, address: str, port: int, stall_seconds: float):
        def health() -> _Response:
            stalled = metrics.stalled_seconds()
            if stalled < UNHEALTHY_FRACTION * allowed_seconds(metrics, stall_seconds):
                return 200, _PLAIN, "ok\n"
            return 503, _PLAIN, f"no progress for {stalled:.0f} seconds\n"

        def not_found() -> _Response:
            return 404, _PLAIN, f"not found; try {', '.join(pages)}\n"

        pages = {
            "/": lambda: (200, "text/html; charset=utf-8", live_page(metrics)),
            "/metrics": lambda: (200, metrics.CONTENT_TYPE, metrics.exposition()),
            "/healthz": health,
        }

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                self.rfile = BytesIO(_read_head(self.connection))
                self.connection.settimeout(RESPONSE_SECONDS)

            def do_GET(self) -> None:
                page = pages.get(self.path, not_found)
                status, content_type, text = page()
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", _POLICY)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 – http.server's name

            def version_string(self) -> str:
                return "alexnet-train"  # hides the versions of Python and its server

            def log_message(self, *_: object) -> None:
                """Do not log requests: Prometheus sends one every few seconds."""

        self._server = _Server((address, port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """An HTTP server with one thread per client, which closes connections beyond MAX_CLIENTS."""

    daemon_threads = True
    allow_reuse_address = True  # allows a port in the state TIME_WAIT, but not one that is in use

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


def start_server(metrics: Metrics, settings: Settings, world: World) -> MetricsServer | None:
    """Start the metrics server, unless the port is 0. Raises SettingsError if it cannot use its port."""
    if settings.port == 0:
        return None
    port = settings.port + world.local_rank
    try:
        return MetricsServer(metrics, settings.address, port, settings.stall_seconds)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise SettingsError(f"--address {settings.address} --port {port}: {error.strerror}") from error
        raise SettingsError(
            f"port {port} is in use: choose another with --port, or use --port 0 to disable the server"
        ) from error
