"""What happened since the last look, gathered without making the host wait for the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.monitor.moment import Moment
from trainer.processes.distributed import World

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
    """Sums losses and errors on the device; `harvest` has them all copied to the host at once."""

    def __init__(self, world: World):
        self.world = world
        self.restart()
        self._reset()

    def restart(self) -> None:
        """Leave out the time since the last harvest, in which there was no training."""
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
        """The batch is there."""
        self._begun = Moment(self.world.device)

    def end_step(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        """The update is done, or queued on a GPU. loss: mean over `images` of this process."""
        self._busy.append((self._begun, Moment(self.world.device)))
        self._sums += torch.stack([loss * images, wrong])
        self._steps += 1
        self._images += images

    def harvest(self, more: Tensor) -> Callable[[], tuple[Interval, list[float]]]:
        """End the interval; the next one begins. more: numbers to fetch with it, float64 [n] on the device.

        Returns what gives the interval and those numbers, and waits until the device has come so far.
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
