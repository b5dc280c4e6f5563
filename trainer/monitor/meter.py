"""Measure log intervals: losses, errors and times of their steps, without making the host wait for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.monitor.device_events import DeviceEvent
from trainer.processes.distributed import World

READY_SECONDS = 0.001  # a batch counts as ready if the wait for it was at most this long
# Thresholds of the verdict; docker/prometheus/rules/recording.yml has the same ones.
COMPUTE_BOUND_BUSY = 0.95  # the device is the limit if it is busy for at least this fraction of the time
# The input is the limit if a smaller fraction of the batches was ready, and the loop waited for at least this
# fraction of the time: without the second, waits of 2 ms before steps of 100 ms would count.
INPUT_BOUND_READY, INPUT_BOUND_WAIT = 0.5, 0.05
# Then the storage behind a URL is the limit if batches waited for it for at least this fraction of that time.
STORAGE_BOUND_WAIT = 0.5
HOST_GAP_READY = 0.95  # the input is not the limit if at least this fraction of the batches was ready


@dataclass(frozen=True)
class Interval:
    """The measurements of a log interval.

    steps: number of steps. images: number of images, over all processes. loss: mean cross-entropy over these
    images. error: fraction of them whose top-1 prediction is wrong. seconds: duration by the device's clock.

    The other values are of this process alone. wait_seconds: host time blocked on the loader. busy_seconds:
    device time spent in steps. ready: number of batches that were ready when requested. storage_wait_seconds:
    time that the loader's reads waited for storage behind a URL, also while the loop did not wait.
    """

    steps: int
    images: int
    loss: float
    error: float
    seconds: float
    wait_seconds: float
    busy_seconds: float
    ready: int
    storage_wait_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def wait_ratio(self) -> float:
        return self.wait_seconds / self.seconds

    @property
    def verdict(self) -> str:
        """What limits the run. docker/prometheus/rules/recording.yml applies the same rules to minutes."""
        if self.busy_seconds >= COMPUTE_BOUND_BUSY * self.seconds:
            return "compute-bound"
        if self.ready < INPUT_BOUND_READY * self.steps and self.wait_ratio >= INPUT_BOUND_WAIT:
            is_storage = self.storage_wait_seconds >= STORAGE_BOUND_WAIT * self.wait_seconds
            return "storage-bound" if is_storage else "input-bound"
        return "host gap" if self.ready >= HOST_GAP_READY * self.steps else "mixed"


class Meter:
    """Sums losses and errors on the device; `harvest` copies the sums to the host once per interval.

    storage_wait: returns the time that reads have waited for storage behind a URL so far, in seconds.
    """

    def __init__(self, world: World, storage_wait: Callable[[], float] = lambda: 0.0):
        self.world, self._storage_wait = world, storage_wait
        self.restart()
        self._reset()

    def restart(self) -> None:
        """Restart the clock of the interval, to exclude a pause in training such as an evaluation."""
        self._start = DeviceEvent(self.world.device)
        self._storage_before = self._storage_wait()

    def _reset(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self._steps = self._images = self._ready = 0
        self._wait_seconds = 0.0
        self._storage_before = self._storage_wait()
        self._busy: list[tuple[DeviceEvent, DeviceEvent]] = []

    def add_wait(self, seconds: float) -> None:
        """Add the time that the host waited for one batch."""
        self._wait_seconds += seconds
        self._ready += seconds <= READY_SECONDS

    def begin_step(self) -> None:
        """Mark the start of a step, once its batch has arrived."""
        self._begun = DeviceEvent(self.world.device)

    def end_step(self, loss: Tensor, wrong: Tensor, images: int) -> None:
        """Mark the end of a step, once its update is done or, on a GPU, queued.

        loss: mean cross-entropy [] over the batch of this process, which has `images` images. wrong: number
        of its top-1 errors []. Both are on the device.
        """
        self._busy.append((self._begun, DeviceEvent(self.world.device)))
        self._sums += torch.stack([loss * images, wrong])
        self._steps += 1
        self._images += images

    def harvest(self, shared: Tensor, own: Tensor) -> Callable[[], tuple[Interval, list[float]]]:
        """End the interval and begin the next one. All processes must call this at the same step.

        shared, own: further values to copy to the host, float64 [n] on the device; `shared` are added up over
        all processes. Returns a function that waits until the device has reached this point, and then returns
        the interval and those values.
        """
        values = torch.cat([self.world.all_reduce(torch.cat([self._sums, shared])), own])
        fetched = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
        fetched.copy_(values, non_blocking=True)
        start, end, busy = self._start, DeviceEvent(self.world.device), self._busy
        steps, images = self._steps, self._images * self.world.size
        wait_seconds, ready = self._wait_seconds, self._ready
        storage_wait_seconds = self._storage_wait() - self._storage_before

        def read() -> tuple[Interval, list[float]]:
            end.wait()
            loss, wrong, *others = fetched.tolist()
            interval = Interval(
                steps=steps,
                images=images,
                loss=loss / images,
                error=wrong / images,
                seconds=end.seconds_since(start),
                wait_seconds=wait_seconds,
                busy_seconds=sum(done.seconds_since(begun) for begun, done in busy),
                ready=ready,
                storage_wait_seconds=storage_wait_seconds,
            )
            return interval, others

        self._start = end
        self._reset()
        return read
