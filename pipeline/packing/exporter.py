"""Export the progress of a packing run as Prometheus metrics.

The rate of packing in images/s is `rate(alexnet_pack_images_total[1m])`.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError
from pipeline.serving import PageServer


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
def serve(progress: Progress, port: int, address: str = "0.0.0.0") -> Iterator[None]:
    """Serve the metrics at /metrics while the block runs.

    Raises PackingError if the address or the port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(_ProgressCollector(progress))
    ProcessCollector(registry=registry)
    page = (200, CONTENT_TYPE_LATEST)
    try:
        server = PageServer({"/metrics": lambda: (*page, generate_latest(registry).decode())}, address, port)
    except OSError as error:
        given = f"--metrics-address {address} --metrics-port {port}"
        another = "port" if error.errno == errno.EADDRINUSE else "address"
        raise PackingError(f"{given}: {error.strerror}: choose another {another}") from None
    try:
        yield
    finally:
        server.close()
