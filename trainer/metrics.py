"""Every Prometheus metric of a run, and the server that shows them; the only importer of
prometheus_client.

Counters are exported, not rates: `rate(alexnet_images_total{phase="train"}[1m])` is images/s.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pynvml
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from trainer.meter import Interval

STALLED_SECONDS = 600.0  # without a step or an evaluation batch: /healthz is no longer healthy
PHASES = ("train", "eval")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SAVE_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, help_: str, *labels: str) -> Gauge:
            return Gauge(f"alexnet_{name}", help_, labels, registry=registry)

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"alexnet_{name}", help_, labels, registry=registry)

        def histogram(name: str, help_: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"alexnet_{name}", help_, labels, buckets=buckets, registry=registry)

        def by_phase(family):
            return {phase: family.labels(phase) for phase in PHASES}

        self.images = by_phase(counter("images", "Images processed by this process.", "phase"))
        self.step_seconds = by_phase(
            histogram("step_seconds", "Wall time of a step, its wait for input included.", _SECONDS, "phase")
        )
        self.input_wait_seconds = by_phase(
            histogram("input_wait_seconds", "Host time blocked on the loader.", _SECONDS, "phase")
        )
        self.busy_seconds = counter("gpu_busy_seconds", "Device time from batch ready to optimiser end.")
        activity = counter("activity_seconds", "Wall time by activity.", "activity")
        self._activity = {name: activity.labels(name) for name in ("start-up", "train", "eval", "checkpoint")}
        self.images_per_second = gauge(
            "images_per_second", "Images of all processes over the last log interval."
        )
        self.step = gauge("step", "Steps done.")
        self.epoch = gauge("epoch", "Epochs done, with the fraction.")
        self.progress_ratio = gauge("progress_ratio", "Share of the run that is done, 0 to 1.")
        self.loss = by_phase(gauge("loss", "Mean cross-entropy last harvested.", "phase"))
        self.learning_rate = gauge("learning_rate", "Of the weights.")
        self.grad_scale = gauge("grad_scale", "Factor on the loss under fp16.")
        self.skipped_steps = counter("skipped_steps", "Updates left out because fp16 gradients overflowed.")
        self.eval_error_ratio = gauge("eval_error_ratio", "Validation error, 0 to 1.", "protocol", "k")
        self.checkpoint_timestamp = gauge(
            "checkpoint_timestamp_seconds", "Unix time of the last good checkpoint."
        )
        self.checkpoint_seconds = histogram("checkpoint_seconds", "Time to save a checkpoint.", _SAVE_SECONDS)
        self.gpu_memory_peak = gauge("gpu_memory_peak_bytes", "Most GPU memory that torch has held.")
        self.gpu_utilization = gauge("gpu_utilization_ratio", "As NVML gives it, 0 to 1.")
        self.jpeg_utilization = gauge("jpeg_engine_utilization_ratio", "As NVML gives it, 0 to 1.")
        self.run_info = Info("alexnet_run", "What is running.", registry=registry)
        self._last_progress = time.monotonic()
        self._grad_scale: float | None = None

    def progress(self) -> None:
        """Note that the run is alive."""
        self._last_progress = time.monotonic()

    def harvested(
        self, interval: Interval, learning_rate: float, grad_scale: float, device: torch.device
    ) -> None:
        """Take over what an interval of training came to."""
        self.loss["train"].set(interval.loss)
        self.learning_rate.set(learning_rate)
        self.images_per_second.set(interval.images_per_second)
        self.busy_seconds.inc(interval.busy_seconds)
        if self._grad_scale is not None and grad_scale < self._grad_scale:
            self.skipped_steps.inc(round(math.log2(self._grad_scale / grad_scale)))  # each halves it
        self._grad_scale = grad_scale
        self.grad_scale.set(grad_scale)
        if device.type == "cuda":
            self.gpu_memory_peak.set(torch.cuda.max_memory_allocated(device))
            handle = _nvml_handle(device)
            self.gpu_utilization.set(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            self.jpeg_utilization.set(pynvml.nvmlDeviceGetJpgUtilization(handle)[0] / 100)

    def evaluated(self, protocol: str, *, loss: float, top1_error: float, top5_error: float) -> None:
        """Take over what an evaluation came to."""
        self.loss["eval"].set(loss)
        self.eval_error_ratio.labels(protocol, "1").set(top1_error)
        self.eval_error_ratio.labels(protocol, "5").set(top5_error)

    def stalled_seconds(self) -> float:
        """Time since the last `progress`."""
        return time.monotonic() - self._last_progress

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._activity[name].inc(time.monotonic() - start)


@cache
def _nvml_handle(device: torch.device):
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class MetricsServer:
    """Serves /metrics and /healthz from a thread until closed.

    Raises OSError if the port is taken.
    """

    def __init__(self, metrics: Metrics, address: str, port: int):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry))
                elif self.path == "/healthz":
                    stalled = metrics.stalled_seconds()
                    healthy = stalled < STALLED_SECONDS
                    text = "ok\n" if healthy else f"no progress for {stalled:.0f} seconds\n"
                    self._answer(200 if healthy else 503, "text/plain", text.encode())
                else:
                    self._answer(404, "text/plain", b"there are /metrics and /healthz\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
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
