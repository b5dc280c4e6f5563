"""What the loader and the model can each do alone: the slower of the two is as fast as training can be."""

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

Work = Callable[[], int]  # does a batch, and returns its images

CALIBRATION_SECONDS = 5.0  # of each ceiling


def rate(work: Work, seconds: float, device: torch.device) -> float:
    """Images/s of `work` over at least `seconds`, by the device's clock, what it queued there included."""
    first, images = Moment(device), 0
    first.wait()
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        images += work()
    last = Moment(device)
    last.wait()
    return images / last.seconds_since(first)


def calibrate(works: Mapping[str, Work], metrics: Metrics, device: torch.device) -> None:
    """Measure a ceiling of each name, and take it over into the metrics."""
    for path, work in works.items():
        work()  # to warm up
        metrics.ceiling(path, rate(work, CALIBRATION_SECONDS, device))
        metrics.progress()


def loader_work(batches: Iterator[Batch]) -> Work:
    """Taking the next batch, and nothing else."""
    return lambda: len(next(batches)[1])


def model_work(
    settings: Settings,
    classes: int,
    decoding: Decoding,
    images: int,
    precision: str,
    mode: str | None = None,
) -> Work:
    """Forward, backward and update of a new net on a batch of `images` that lies ready.

    mode: of torch.compile, where the settings ask for it.
    """
    model = build_model(settings, classes, decoding.device, settings.form)
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 1e-6)  # so that it stays finite on the same batch for ever
    trained = torch.compile(model, mode=mode) if settings.compile else model
    step = Step(trained, optimizer, precision, decoding.device)
    batches = synthetic_loader(images, classes, decoding)

    def work() -> int:
        pixels, labels = next(batches)
        step(pixels, labels)
        return len(labels)

    return work
