"""Measure the throughput of the loader and of the model separately; training cannot exceed the slower one."""

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline.loader import Batch, Decoding, synthetic_loader
from trainer.build import build_model
from trainer.monitor.device_events import DeviceEvent
from trainer.monitor.metrics import Metrics
from trainer.optim import make_optimizer, set_learning_rate
from trainer.settings import Settings
from trainer.step import Step

Work = Callable[[], int]  # processes one batch, and returns its number of images

CALIBRATION_SECONDS = 5.0  # how long to measure each ceiling
FIRST_STEPS = 3  # in which a model is compiled and cuDNN finds the fastest algorithms


def measure_throughput(work: Work, seconds: float, device: torch.device) -> float:
    """Repeat `work` for at least `seconds`, and return the images/s by the device's clock.

    The time includes that of work which is still queued on the device when the last call returns.
    """
    first, images = DeviceEvent(device), 0
    first.wait()
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        images += work()
    last = DeviceEvent(device)
    last.wait()
    return images / last.seconds_since(first)


def calibrate(works: Mapping[str, Work], metrics: Metrics, device: torch.device) -> None:
    """Measure the throughput of each work, and record it in the metrics under the work's name."""
    for name, work in works.items():
        work()  # warm-up
        metrics.record_ceiling(name, measure_throughput(work, CALIBRATION_SECONDS, device))
        metrics.record_progress()


def loader_work(batches: Iterator[Batch]) -> Work:
    """Return work that only takes the next batch from a loader."""
    return lambda: len(next(batches)[1])


def model_work(
    settings: Settings,
    classes: int,
    decoding: Decoding,
    images: int,
    precision: str,
    mode: str | None = None,
) -> Work:
    """Return work that trains a new net for one step on a random batch that is already on the device.

    images: size of the batch. precision: `bf16`, `fp16` or `fp32`. mode: the mode of torch.compile, if the
    settings ask for compilation.
    """
    model = build_model(settings, classes, decoding.device, settings.form)
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 1e-6)  # keeps the weights finite, however often the same batch is repeated
    trained = torch.compile(model, mode=mode) if settings.compile else model
    step = Step(trained, optimizer, precision, decoding.device)
    batches = synthetic_loader(images, classes, decoding)

    def work() -> int:
        pixels, labels = next(batches)
        step(pixels, labels)
        return len(labels)

    return work


def measure_model(
    settings: Settings, classes: int, decoding: Decoding, images: int, precision: str, seconds: float
) -> float:
    """Return the images/s of `model_work`, measured for `seconds` after its first steps."""
    work = model_work(settings, classes, decoding, images, precision)
    for _ in range(FIRST_STEPS):
        work()
    return measure_throughput(work, seconds, decoding.device)
