"""Measurement of log intervals, which never makes the host wait for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.monitor.moment import Moment
from trainer.processes.distributed import World

READY_SECONDS = 0.001  # a batch counts as ready if waiting for it took no longer
# Thresholds of the verdict; docker/prometheus/rules/recording.yml has the same ones.
COMPUTE_BOUND_BUSY = 0.95  # share of the time in which the device is busy
INPUT_BOUND_READY = 0.5  # share of the batches that were ready, below which the input is the limit
HOST_GAP_READY = 0.95  # share of the batches that were ready, from which the input is not the limit


@dataclass(frozen=True)
class Interval:
    """A log interval: means and totals over all processes, and three values of this process alone.

    These are busy_seconds, the device time spent in steps; wait_seconds, the host time blocked on the loader;
    and ready, the number of batches that were ready when requested.
    """

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
        """What limits the run. docker/prometheus/rules/recording.yml judges a longer time in the same way."""
        if self.busy_seconds >= COMPUTE_BOUND_BUSY * self.seconds:
            return "compute-bound"
        if self.ready < INPUT_BOUND_READY * self.steps:
            return "input-bound"
        return "host gap" if self.ready >= HOST_GAP_READY * self.steps else "mixed"


class Meter:
    """Sums losses and errors on the device; `harvest` copies all of them to the host at once."""

    def __init__(self, world: World):
        self.world = world
        self.restart()
        self._reset()

    def restart(self) -> None:
        """Exclude the time since the last harvest, during which there was no training."""
        self._start = Moment(self.world.device)

    def _reset(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self._steps = self._images = self._ready = 0
        self._waited = 0.0
        self._busy: list[tuple[Moment, Moment]] = []

    def waited(self, seconds: float) -> None:
        self._waited += seconds
        self._ready += seconds <= READY_SECONDS

    def begin_step(self) -> None:
        """Note that the batch has arrived."""
        self._begun = Moment(self.world.device)

    def end_step(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        """Note that the update is done or, on a GPU, queued. loss: mean over the `images` of this process."""
        self._busy.append((self._begun, Moment(self.world.device)))
        self._sums += torch.stack([loss * images, wrong])
        self._steps += 1
        self._images += images

    def harvest(self, more: Tensor) -> Callable[[], tuple[Interval, list[float]]]:
        """End the interval and begin the next one. more: values to fetch with it, float64 [n] on the device.

        Returns a function that waits until the device has reached this point, and returns the interval and
        those values.
        """
        values = torch.cat([self.world.sum(self._sums), more])
        fetched = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        fetched.copy_(values, non_blocking=True)
        start, end, busy = self._start, Moment(self.world.device), self._busy
        steps, images, waited, ready = self._steps, self._images * self.world.size, self._waited, self._ready

        def read() -> tuple[Interval, list[float]]:
            end.wait()
            loss, wrong, *others = fetched.tolist()
            interval = Interval(
                steps=steps,
                images=images,
                loss=loss / images,
                error=wrong / images,
                seconds=end.seconds_since(start),
                wait_seconds=waited,
                busy_seconds=sum(done.seconds_since(begun) for begun, done in busy),
                ready=ready,
            )
            return interval, others

        self._start = end
        self._reset()
        return read
