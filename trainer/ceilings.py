"""What the loader and the model can each do alone: the slower of the two is as fast as training can be."""

import time
from collections.abc import Callable, Iterator

import torch

from pipeline.loader import Batch, Decoding, synthetic_loader
from trainer.build import build_model
from trainer.optim import make_optimizer, set_learning_rate
from trainer.settings import Settings
from trainer.step import Step

Work = Callable[[], int]  # does a batch, and returns its images


def rate(work: Work, seconds: float, device: torch.device) -> float:
    """Images/s of `work` over at least `seconds`, what it queued on the device included.

    On a GPU the time is the device's own, between two events of its stream.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += work()
    if on_gpu:
        last.record()
        last.synchronize()
        return images / (first.elapsed_time(last) / 1000)
    return images / (time.perf_counter() - start)


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
    model = build_model(settings, classes, decoding.device)
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
