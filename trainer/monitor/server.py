"""The HTTP server of a process: /metrics for Prometheus, /healthz for supervisors, / for people.

It reads only the request line and headers from a client, at most HEAD_BYTES within HEAD_SECONDS, and uses
only the method and the path. It serves up to MAX_CLIENTS at a time, and closes other connections.
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
from trainer.processes.watchdog import UNHEALTHY_SHARE, allowed_seconds
from trainer.settings import Settings, SettingsError

HEAD_BYTES = 16384
HEAD_SECONDS = 5.0
ANSWER_SECONDS = 30.0  # for the client to receive the response
MAX_CLIENTS = 32
# The live page contains its own style and script, and sends requests to this server only.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
_PLAIN = "text/plain; charset=utf-8"
_Answer = tuple[int, str, str]  # status, content type, text


class MetricsServer:
    """Serves from a thread until closed. Raises OSError if the port is in use.

    stall_seconds: that of the watchdog; /healthz reports 503 after UNHEALTHY_SHARE of the time it allows.
    """

    def __init__(self, metrics: Metrics, address: str, port: int, stall_seconds: float):
        def health() -> _Answer:
            stalled = metrics.stalled_seconds()
            if stalled < UNHEALTHY_SHARE * allowed_seconds(metrics, stall_seconds):
                return 200, _PLAIN, "ok\n"
            return 503, _PLAIN, f"no progress for {stalled:.0f} seconds\n"

        pages = {
            "/": lambda: (200, "text/html; charset=utf-8", live_page(metrics)),
            "/metrics": lambda: (200, metrics.CONTENT_TYPE, metrics.exposition()),
            "/healthz": health,
        }

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                self.rfile = BytesIO(_read_head(self.connection))
                self.connection.settimeout(ANSWER_SECONDS)

            def do_GET(self) -> None:
                page = pages.get(self.path)
                status, kind, text = page() if page else (404, _PLAIN, f"not found; try {', '.join(pages)}\n")
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", _POLICY)
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 – http.server's name

            def version_string(self) -> str:
                return "alexnet-train"  # without any versions

            def log_message(self, *_: object) -> None:
                """Do not log requests: Prometheus sends one every few seconds."""

        self._server = _Server((address, port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """An HTTP server with one thread per client, and at most MAX_CLIENTS clients."""

    daemon_threads = True
    allow_reuse_address = True  # of a port in TIME_WAIT, not of one in use

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
        """Ignore errors of clients that are slow or gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _read_head(connection: socket.socket) -> bytes:
    """Read the request line and headers, or what arrives of them. Raises TimeoutError if they are slow."""
    head, end = b"", time.monotonic() + HEAD_SECONDS
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < HEAD_BYTES:
        connection.settimeout(max(end - time.monotonic(), 0.001))  # the limit is for the whole head
        part = connection.recv(HEAD_BYTES - len(head))
        if not part:
            break
        head += part
    return head


def serve(metrics: Metrics, settings: Settings, world: World) -> MetricsServer | None:
    """Start the metrics server, unless the port is 0. Raises SettingsError if its port is in use."""
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
