"""Every Prometheus metric of a run; the only importer of prometheus_client.

Counters are exported, not rates: `rate(alexnet_images_total{phase="train"}[1m])` is images/s.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pynvml
import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from trainer.monitor.meter import READY_SECONDS, Interval

PHASES = ("train", "eval")
disable_created_metrics()  # a second gauge for each counter, which nobody here reads
_SECONDS = (READY_SECONDS, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LEAST_SCALE = 2.0**-149  # in fp32, before it is 0
_HISTORY = 240  # intervals that the live page draws
_SAVE_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one process, in a registry of its own."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

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
        self.skipped_steps = counter("skipped_steps", "Updates left out because gradients were not finite.")
        unsound = counter(
            "unsound_intervals",
            "Log intervals whose loss or weights were not finite, whose fp16 scale had collapsed, "
            "or whose loss was that of guessing.",
            "reason",
        )
        self.unsound = {name: unsound.labels(name) for name in ("not finite", "overflow", "chance")}
        self.eval_error_ratio = gauge("eval_error_ratio", "Validation error, 0 to 1.", "protocol", "k")
        self.checkpoint_timestamp = gauge(
            "checkpoint_timestamp_seconds", "Unix time of the last good checkpoint."
        )
        self.checkpoint_seconds = histogram(
            "checkpoint_seconds", "Time to save a checkpoint, beside training.", _SAVE_SECONDS
        )
        self.checkpoint_stall_seconds = histogram(
            "checkpoint_stall_seconds", "Time that training stood still for a checkpoint.", _SECONDS
        )
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the last good checkpoint.")
        self.checkpoint_failures = counter("checkpoint_failures", "Checkpoints that could not be written.")
        # With a label, so that there are none where there is no GPU.
        self._gpu = {
            "memory_peak": gauge("gpu_memory_peak_bytes", "Most GPU memory that torch has held.", "gpu"),
            "memory_used": gauge(
                "gpu_memory_used_ratio", "Of the whole GPU, DALI's memory included, 0 to 1.", "gpu"
            ),
            "busy": gauge("gpu_utilization_ratio", "As NVML gives it, 0 to 1.", "gpu"),
            "jpeg_engine": gauge("jpeg_engine_utilization_ratio", "As NVML gives it, 0 to 1.", "gpu"),
        }
        input_errors = counter("input_errors", "Samples left out of a batch.", "reason")
        self.input_errors = {name: input_errors.labels(name) for name in ("unreadable", "undecodable")}
        self._ceiling = gauge("ceiling_images_per_second", "Loader or model of this process alone.", "path")
        self._run_info = Info("alexnet_run", "What is running.", registry=registry)
        ProcessCollector(registry=registry)
        self.history: deque[Interval] = deque(maxlen=_HISTORY)
        self.doing = "start-up"
        self._last_progress = time.monotonic()
        self._grad_scale: float | None = None

    def progress(self, now: str | None = None) -> None:
        """Note that the run is alive. now: what it does next, where that changes."""
        self._last_progress = time.monotonic()
        self.doing = now or self.doing

    def harvested(
        self, interval: Interval, learning_rate: float, grad_scale: float, device: torch.device
    ) -> None:
        """Take over what an interval of training came to."""
        self.history.append(interval)
        self.loss["train"].set(interval.loss)
        self.learning_rate.set(learning_rate)
        self.images_per_second.set(interval.images_per_second)
        self.busy_seconds.inc(interval.busy_seconds)
        if self._grad_scale is not None and grad_scale < self._grad_scale:
            halvings = math.log2(self._grad_scale / max(grad_scale, _LEAST_SCALE))
            self.skipped_steps.inc(round(halvings))  # one each
        self._grad_scale = grad_scale
        self.grad_scale.set(grad_scale)
        if device.type == "cuda":
            self._look_at_gpu(device)

    def _look_at_gpu(self, device: torch.device) -> None:
        """What NVML does not give, of a part of a GPU (MIG) or without its library, has no gauge."""
        gpu = str(device.index)
        self._gpu["memory_peak"].labels(gpu).set(torch.cuda.max_memory_allocated(device))
        for name, ratio in _NVML_RATIOS.items():
            try:
                value = ratio(_nvml_handle(device))
            except pynvml.NVMLError:
                self._gpu[name].remove(gpu)
            else:
                self._gpu[name].labels(gpu).set(value)

    def evaluated(self, protocol: str, *, loss: float, top1_error: float, top5_error: float) -> None:
        """Take over what an evaluation came to."""
        self.loss["eval"].set(loss)
        self.eval_error_ratio.labels(protocol, "1").set(top1_error)
        self.eval_error_ratio.labels(protocol, "5").set(top5_error)

    def ceiling(self, path: str, images_per_second: float) -> None:
        """Take over what `loader` or `model` can do alone."""
        self._ceiling.labels(path).set(images_per_second)

    def describe(self, about: Mapping[str, str]) -> None:
        """Say what is running, in labels."""
        self._run_info.info({name.replace("-", "_"): value for name, value in about.items()})

    def exposition(self) -> str:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry).decode()

    def stalled_seconds(self) -> float:
        """Time since the last `progress`."""
        return time.monotonic() - self._last_progress

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        self.progress(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self._activity[name].inc(time.monotonic() - start)


def _memory_used(handle: Any) -> float:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return memory.used / memory.total


_NVML_RATIOS: dict[str, Callable[[Any], float]] = {
    "memory_used": _memory_used,
    "busy": lambda handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
    "jpeg_engine": lambda handle: pynvml.nvmlDeviceGetJpgUtilization(handle)[0] / 100,
}


@cache
def _nvml_handle(device: torch.device):
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
