"""The HTTP server of a process: /metrics for Prometheus, /healthz for supervisors, / for people."""

import errno
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from trainer.distributed import World
from trainer.live import live_page
from trainer.metrics import Metrics
from trainer.settings import Settings, SettingsError

STALLED_SECONDS = 600.0  # without a step or an evaluation batch: /healthz is no longer healthy
# The live page holds its own style and script, and asks this server alone.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
_PLAIN = "text/plain; charset=utf-8"
_Answer = tuple[int, str, str]  # status, content type, text


class MetricsServer:
    """Serves from a thread until closed. Raises OSError if the port is taken."""

    def __init__(self, metrics: Metrics, address: str, port: int):
        def health() -> _Answer:
            stalled = metrics.stalled_seconds()
            if stalled < STALLED_SECONDS:
                return 200, _PLAIN, "ok\n"
            return 503, _PLAIN, f"no progress for {stalled:.0f} seconds\n"

        pages = {
            "/": lambda: (
                200,
                "text/html; charset=utf-8",
                live_page(metrics.exposition(), list(metrics.history)),
            ),
            "/metrics": lambda: (200, metrics.CONTENT_TYPE, metrics.exposition()),
            "/healthz": health,
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                status, kind, text = page() if page else (404, _PLAIN, f"there are {', '.join(pages)}\n")
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", _POLICY)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are not worth a line each."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True  # of a port in TIME_WAIT, not of one in use

        self._server = Server((address, port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve(metrics: Metrics, settings: Settings, world: World) -> MetricsServer | None:
    """Start the metrics server. Raises SettingsError if its port is taken."""
    if settings.port == 0:
        return None
    port = settings.port + world.local_rank
    try:
        return MetricsServer(metrics, settings.address, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise SettingsError(f"--address {settings.address} --port {port}: {error.strerror}") from error
        raise SettingsError(
            f"port {port} is in use: choose another with --port, or 0 for no metrics"
        ) from error
