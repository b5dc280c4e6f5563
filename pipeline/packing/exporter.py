"""Export the progress of a packing run as Prometheus metrics.

The rate of packing in images/s is `rate(alexnet_pack_images_total[1m])`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError


class _ProgressCollector(Collector):
    """Reads the values of a Progress only when they are scraped."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def collect(self) -> Iterator[Metric]:
        progress, counts = self.progress, self.progress.counts
        yield CounterMetricFamily("alexnet_pack_images", "Images processed by this run.", counts.images)
        yield CounterMetricFamily("alexnet_pack_bytes", "JPEG bytes packed by this run.", counts.bytes)
        yield CounterMetricFamily("alexnet_pack_rejected", "Images rejected by this run.", counts.rejected)
        yield GaugeMetricFamily("alexnet_pack_planned_images", "Images in the whole dataset.", progress.total)
        yield GaugeMetricFamily(
            "alexnet_pack_progress_ratio",
            "Fraction of the planned images that is done, including earlier runs, 0 to 1.",
            progress.done / max(progress.total, 1),
        )
        yield GaugeMetricFamily(
            "alexnet_pack_left_seconds",
            "Seconds left at the rate of the last half minute.",
            progress.seconds_left,
        )


@contextmanager
def serve(progress: Progress, port: int) -> Iterator[None]:
    """Serve the metrics at /metrics while the block runs. Raises PackingError if the port cannot be used."""
    registry = CollectorRegistry()
    registry.register(_ProgressCollector(progress))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise PackingError(f"--metrics-port {port}: {error.strerror}: choose another port") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
