"""The throughput of the loader and of the model on their own; the slower one is the ceiling of training."""

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeline.loader import Batch, Decoding, synthetic_loader
from trainer.build import build_model
from trainer.monitor.metrics import Metrics
from trainer.monitor.moment import Moment
from trainer.optim import make_optimizer, set_learning_rate
from trainer.settings import Settings
from trainer.step import Step

Work = Callable[[], int]  # processes a batch, and returns its number of images

CALIBRATION_SECONDS = 5.0  # of measuring each ceiling


def rate(work: Work, seconds: float, device: torch.device) -> float:
    """Measure the images/s of `work` for at least `seconds`, by the device's clock, queued work included."""
    first, images = Moment(device), 0
    first.wait()
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        images += work()
    last = Moment(device)
    last.wait()
    return images / last.seconds_since(first)


def calibrate(works: Mapping[str, Work], metrics: Metrics, device: torch.device) -> None:
    """Measure the ceiling of each work, and record it in the metrics."""
    for path, work in works.items():
        work()  # warm-up
        metrics.ceiling(path, rate(work, CALIBRATION_SECONDS, device))
        metrics.progress()


def loader_work(batches: Iterator[Batch]) -> Work:
    """Return work that takes the next batch, and does nothing else."""
    return lambda: len(next(batches)[1])


def model_work(
    settings: Settings,
    classes: int,
    decoding: Decoding,
    images: int,
    precision: str,
    mode: str | None = None,
) -> Work:
    """Return work that does a training step of a new net on a ready batch of `images` images.

    mode: the mode of torch.compile, if the settings ask for compilation.
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
