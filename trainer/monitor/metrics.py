"""Define every Prometheus metric of a run. In the trainer, only this module imports prometheus_client.

Counters are exported instead of rates: `rate(alexnet_images_total{phase="train"}[1m])` is images/s.
"""

import math
import threading
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
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pipeline.remote.counters import Counters
from trainer.monitor.live_data import LiveData
from trainer.monitor.meter import READY_SECONDS, Interval

PHASES = ("train", "eval")
disable_created_metrics()  # they would add a gauge with the time of creation to each counter
_SECONDS = (READY_SECONDS, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_HISTORY = 240  # number of intervals that the live page draws
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

        def by_phase(family: Any) -> dict[str, Any]:
            return {phase: family.labels(phase) for phase in PHASES}

        self.images = by_phase(counter("images", "Images processed by this process.", "phase"))
        self.step_seconds = by_phase(
            histogram("step_seconds", "Wall time of a step, including the wait for input.", _SECONDS, "phase")
        )
        self.input_wait_seconds = by_phase(
            histogram("input_wait_seconds", "Host time blocked on the loader.", _SECONDS, "phase")
        )
        self.busy_seconds = counter("gpu_busy_seconds", "Device time from batch ready to end of update.")
        self._activities = _ActivityCollector()
        registry.register(self._activities)
        self.images_per_second = gauge(
            "images_per_second", "Throughput of all processes over the last log interval."
        )
        self.step = gauge("step", "Steps done.")
        self.epoch = gauge("epoch", "Epochs done, including the fraction.")
        self.progress_ratio = gauge("progress_ratio", "Fraction of the run that is done; 1: complete.")
        # A gauge with a label is not exported until it is set, so there is no loss before the first one.
        self._loss = gauge("loss", "Mean cross-entropy at the last log or evaluation.", "phase")
        self.learning_rate = gauge("learning_rate", "Learning rate of the weights.")
        self.grad_scale = gauge("grad_scale", "Loss scale in fp16.")
        self.skipped_steps = counter("skipped_steps", "Updates skipped because gradients were not finite.")
        unsound = counter(
            "unsound_intervals",
            "Log intervals whose loss or weights were not finite, whose fp16 loss scale had collapsed, "
            "or whose loss was at chance level.",
            "reason",
        )
        self.unsound = {name: unsound.labels(name) for name in ("not finite", "overflow", "chance")}
        self.eval_error_ratio = gauge("eval_error_ratio", "Validation error, 0 to 1.", "protocol", "k")
        self.checkpoint_timestamp = gauge(
            "checkpoint_timestamp_seconds", "Unix time of the last good checkpoint."
        )
        self.checkpoint_seconds = histogram(
            "checkpoint_seconds", "Time to save a checkpoint while training goes on.", _SAVE_SECONDS
        )
        self.checkpoint_stall_seconds = histogram(
            "checkpoint_stall_seconds", "Time that training was paused for a checkpoint.", _SECONDS
        )
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the last good checkpoint.")
        self.checkpoint_failures = counter("checkpoint_failures", "Checkpoints that could not be written.")
        # Because they have a label, these gauges are not exported until they are set, which takes a GPU.
        self._gpu = {
            "memory_peak": gauge("gpu_memory_peak_bytes", "Peak GPU memory allocated by torch.", "gpu"),
            "memory_used": gauge(
                "gpu_memory_used_ratio", "Share of GPU memory in use, including DALI's, 0 to 1.", "gpu"
            ),
            "busy": gauge("gpu_utilization_ratio", "GPU utilisation reported by NVML, 0 to 1.", "gpu"),
            "jpeg_engine": gauge(
                "jpeg_engine_utilization_ratio", "JPEG engine utilisation reported by NVML, 0 to 1.", "gpu"
            ),
        }
        input_errors = counter("input_errors", "Damaged samples left out of a batch.", "reason")
        self.input_errors = {name: input_errors.labels(name) for name in ("unreadable", "undecodable")}
        self._ceiling = gauge(
            "ceiling_images_per_second", "Throughput of this process's loader or model on its own.", "path"
        )
        self._storage = _StorageCollector()
        registry.register(self._storage)
        self._run_info = Info("alexnet_run", "Description of the run.", registry=registry)
        self.about: dict[str, str] = {}  # the labels of alexnet_run_info
        ProcessCollector(registry=registry)
        self.history: deque[Interval] = deque(maxlen=_HISTORY)
        self.live = LiveData()
        self.current_activity = "start-up"
        self._last_progress = time.monotonic()

    def record_progress(self, activity: str | None = None) -> None:
        """Record that the run has made progress. activity: what it does next, if that changes."""
        self._last_progress = time.monotonic()
        self.current_activity = activity or self.current_activity

    def record_interval(
        self, interval: Interval, learning_rate: float, grad_scale: float, device: torch.device
    ) -> None:
        """Record a log interval of training. grad_scale: the loss scale in fp16, otherwise 1."""
        self.history.append(interval)
        self._loss.labels("train").set(interval.loss)
        self.learning_rate.set(learning_rate)
        self.images_per_second.set(interval.images_per_second)
        self.busy_seconds.inc(interval.busy_seconds)
        self.grad_scale.set(grad_scale)
        if device.type == "cuda":
            self._update_gpu_gauges(device)

    def _update_gpu_gauges(self, device: torch.device) -> None:
        """Update the GPU's gauges, and remove those that NVML cannot report, as with MIG or without NVML."""
        gpu = str(device.index)
        self._gpu["memory_peak"].labels(gpu).set(torch.cuda.max_memory_allocated(device))
        for name, ratio in _NVML_RATIOS.items():
            try:
                value = ratio(_nvml_handle(device))
            except pynvml.NVMLError:
                self._gpu[name].remove(gpu)
            else:
                self._gpu[name].labels(gpu).set(value)

    def record_evaluation(
        self, protocol: str, *, loss: float, top1_error: float, top5_error: float | None
    ) -> None:
        """Record an evaluation.

        protocol: `centre` or `ten` crops. The errors are ratios from 0 to 1. top5_error: None if there are so
        few classes that it is not shown.
        """
        self._loss.labels("eval").set(loss)
        self.eval_error_ratio.labels(protocol, "1").set(top1_error)
        if top5_error is not None:
            self.eval_error_ratio.labels(protocol, "5").set(top5_error)

    def record_ceiling(self, path: str, images_per_second: float) -> None:
        """Record the throughput of the `loader` or the `model` on its own."""
        self._ceiling.labels(path).set(images_per_second)

    def follow_storage(self, counters: Counters) -> None:
        """Export what is fetched from storage behind URLs. counters: read at each scrape."""
        self._storage.counters = counters

    @property
    def storage_wait_seconds(self) -> float:
        """The time that reads have waited for storage behind a URL so far."""
        return self._storage.counters.wait_seconds

    def describe(self, about: Mapping[str, str]) -> None:
        """Record a description of the run, as the labels of alexnet_run_info."""
        # A path may contain bytes that are not UTF-8, which the server cannot send.
        shown = {name: value.encode(errors="backslashreplace").decode() for name, value in about.items()}
        self.about = {name.replace("-", "_"): value for name, value in shown.items()}
        self._run_info.info(self.about)

    def value(self, name: str, **labels: str) -> float:
        """Return the current value of alexnet_<name> with these labels; NaN if it has none yet."""
        value = self.registry.get_sample_value(f"alexnet_{name}", labels)
        return math.nan if value is None else value

    def exposition(self) -> str:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def stalled_seconds(self) -> float:
        """Return the time since the last call of `record_progress`."""
        return time.monotonic() - self._last_progress

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Add the duration of the `with` block to the time that is counted for an activity."""
        self.record_progress(name)
        self._activities.switch_to(name)
        try:
            yield
        finally:
            self._activities.switch_to(None)


class _ActivityCollector(Collector):
    """Counts the wall time of each activity up to the moment of a scrape, since some take many minutes."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("start-up", "train", "eval", "checkpoint"), 0.0)
        self._current: str | None = None
        self._begun = 0.0
        self._lock = threading.Lock()

    def switch_to(self, activity: str | None) -> None:
        with self._lock:
            self._count()
            self._current = activity

    def _count(self) -> None:
        """Add the time since the last call to the current activity."""
        now = time.monotonic()
        if self._current is not None:
            self._seconds[self._current] += now - self._begun
        self._begun = now

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            self._count()
            seconds = self._seconds.copy()
        family = CounterMetricFamily(
            "alexnet_activity_seconds", "Wall time by activity.", labels=["activity"]
        )
        for activity, value in seconds.items():
            family.add_metric([activity], value)
        yield family


class _StorageCollector(Collector):
    """Reads the counters of the storage behind URLs only when they are scraped; they are 0 without any."""

    def __init__(self) -> None:
        self.counters = Counters()

    def collect(self) -> Iterator[Metric]:
        counters = self.counters
        totals = {
            "bytes": ("Bytes fetched.", counters.bytes_fetched),
            "shards": ("Shards fetched as a whole.", counters.shards_fetched),
            "samples": ("Samples fetched on their own.", counters.samples_by_range),
            "evictions": ("Shards deleted from the cache to make room.", counters.evictions),
            "retries": ("Requests that failed and were repeated.", counters.retries),
            "wait_seconds": ("Time that batches waited for storage.", counters.wait_seconds),
        }
        for name, (help_, value) in totals.items():
            yield CounterMetricFamily(f"alexnet_storage_{name}", help_, value)
        lookups = {
            "shard": ("Shards looked up in the cache.", counters.shard_hits, counters.shard_misses),
            "sample": ("Samples looked up in the cache.", counters.sample_hits, counters.sample_misses),
        }
        for name, (help_, hits, misses) in lookups.items():
            family = CounterMetricFamily(f"alexnet_storage_{name}_lookups", help_, labels=["result"])
            family.add_metric(["hit"], hits)
            family.add_metric(["miss"], misses)
            yield family


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
