"""The pages of a process: /metrics for Prometheus, /healthz for supervisors, / and /batch for a browser."""

import time
from contextlib import suppress
from pathlib import Path

from pipeline.serving import PLAIN, PageServer, Response
from trainer.monitor.live import live_page
from trainer.monitor.metrics import Metrics
from trainer.preflight import is_in_container, port_error
from trainer.processes.distributed import World
from trainer.processes.stop import StopRequest
from trainer.processes.watchdog import UNHEALTHY_FRACTION, allowed_seconds
from trainer.settings import Settings

HTML = "text/html; charset=utf-8"
SCRAPE_SECONDS = 65.0  # at most; docker/prometheus scrapes every five seconds, others every minute
# Where the image's health check finds out whom to ask; without the file, there is no server.
ADDRESS_FILE = Path("/tmp/alexnet-train.address")


class MetricsServer(PageServer):
    """Serves from its own thread until it is closed. Raises OSError as PageServer does.

    port: port to bind to; 0 lets the system choose one. stall_seconds: time limit of the watchdog; after
    UNHEALTHY_FRACTION of the time that the watchdog allows without progress, /healthz responds with 503.
    show_images: whether there is /batch, which shows images of the current batch.
    """

    def __init__(
        self, metrics: Metrics, address: str, port: int, stall_seconds: float, show_images: bool = True
    ):
        def health() -> Response:
            stalled = metrics.stalled_seconds()
            if stalled < UNHEALTHY_FRACTION * allowed_seconds(metrics, stall_seconds):
                return 200, PLAIN, "ok\n"
            return 503, PLAIN, f"no progress for {stalled:.0f} seconds\n"

        pages = {
            "/": lambda: (200, HTML, live_page(metrics, show_images)),
            "/metrics": lambda: (200, metrics.CONTENT_TYPE, metrics.exposition()),
            "/healthz": health,
        }
        if show_images:
            pages["/batch"] = lambda: (200, HTML, metrics.live.batch.html(metrics.live.names))
        super().__init__(pages, address, port)
        self._metrics = metrics
        self._address_file: Path | None = None

    def announce(self, address: str) -> None:
        """Tell the image's health check where this server is, until it is closed."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
        with suppress(OSError):  # there may be no folder to write to
            ADDRESS_FILE.write_text(f"{host} {self.port}")
            self._address_file = ADDRESS_FILE

    def wait_for_scrape(self, stop: StopRequest) -> None:
        """Let a Prometheus that has scraped this process more than once see its last values."""
        before, deadline = self.served["/metrics"], time.monotonic() + SCRAPE_SECONDS
        while before > 1 and self.served["/metrics"] == before and time.monotonic() < deadline:
            if stop.is_made:
                break
            self._metrics.record_progress()
            time.sleep(0.1)

    def close(self) -> None:
        super().close()
        if self._address_file is not None:
            with suppress(OSError):
                self._address_file.unlink()


def start_server(metrics: Metrics, settings: Settings, world: World) -> MetricsServer | None:
    """Start the metrics server, unless the port is 0. Raises SettingsError if it cannot use its port."""
    if settings.port == 0:
        return None
    port = settings.port + world.local_rank
    try:
        server = MetricsServer(metrics, settings.address, port, settings.stall_seconds, settings.show_images)
    except OSError as error:
        raise port_error(settings, port, error) from error
    if is_in_container() and world.local_rank == 0:
        server.announce(settings.address)
    return server
