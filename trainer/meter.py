"""What happened since the last look, gathered without making the host wait for the device."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed import World

READY_SECONDS = 0.001  # a batch that takes no longer to get was ready


@dataclass(frozen=True)
class Interval:
    """Means over an interval and all processes. This process's are busy_seconds, device time in steps;
    wait_seconds, host time blocked on the loader; and ready, how many batches it had at once."""

    steps: int
    images: int
    loss: float
    error: float
    seconds: float
    wait_seconds: float
    busy_seconds: float
    ready: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def wait_ratio(self) -> float:
        return self.wait_seconds / self.seconds

    @property
    def verdict(self) -> str:
        """What limits the run, as docker/prometheus/rules/recording.yml judges it over a longer time."""
        if self.busy_seconds >= 0.95 * self.seconds:
            return "compute-bound"
        if self.ready < 0.5 * self.steps:
            return "input-bound"
        return "host gap" if self.ready >= 0.95 * self.steps else "mixed"


class Meter:
    """Sums losses and errors on the device; `harvest` fetches them all at once."""

    def __init__(self, world: World):
        self.world = world
        self._reset()

    def restart(self) -> None:
        """Leave out the time since the last harvest, in which there was no training."""
        self._start = time.monotonic()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self._steps = self._images = self._ready = 0
        self._waited = self._busy = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.monotonic()

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        self._ready += seconds <= READY_SECONDS

    def begin_step(self) -> None:
        """The batch is there."""
        if self.world.device.type == "cuda":
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        else:
            self._begun = time.monotonic()

    def end_step(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        """The update is done, or queued on a GPU. loss: mean over `images` of this process."""
        if self._events:
            self._events[-1][1].record()
        else:
            self._busy += time.monotonic() - self._begun
        self._sums += torch.stack([loss * images, wrong])
        self._steps += 1
        self._images += images

    def harvest(self) -> Interval:
        """The interval so far; the next one begins."""
        loss, wrong = self.world.sum(self._sums).tolist()
        images = self._images * self.world.size
        busy = self._busy + sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        seconds = time.monotonic() - self._start
        interval = Interval(
            steps=self._steps,
            images=images,
            loss=loss / images,
            error=wrong / images,
            seconds=seconds,
            wait_seconds=self._waited,
            busy_seconds=busy,
            ready=self._ready,
        )
        self._reset()
        return interval
