"""A packing run as Prometheus sees it: the figures of its `Progress`, in a registry of their own.

`rate(alexnet_pack_images_total[1m])` is images/s.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError


class _Figures(Collector):
    """Read when they are scraped, so that packing does nothing for them."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def collect(self) -> Iterator[Metric]:
        progress, counts = self.progress, self.progress.counts
        yield CounterMetricFamily("alexnet_pack_images", "Images this run is through with.", counts.images)
        yield CounterMetricFamily("alexnet_pack_bytes", "JPEG bytes packed by this run.", counts.bytes)
        yield CounterMetricFamily("alexnet_pack_rejected", "Images rejected by this run.", counts.rejected)
        yield GaugeMetricFamily("alexnet_pack_planned_images", "Images of the whole dataset.", progress.total)
        yield GaugeMetricFamily(
            "alexnet_pack_progress_ratio",
            "Share of them that is done, by earlier runs too, 0 to 1.",
            progress.done / max(progress.total, 1),
        )
        yield GaugeMetricFamily(
            "alexnet_pack_left_seconds",
            "Time left at the rate of the last half minute.",
            progress.seconds_left,
        )


@contextmanager
def serve(progress: Progress, port: int) -> Iterator[None]:
    """Serve /metrics while the block runs. Raises PackingError if the port cannot be had."""
    registry = CollectorRegistry()
    registry.register(_Figures(progress))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise PackingError(f"--metrics-port {port}: {error.strerror}: choose another") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
