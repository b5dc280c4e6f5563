"""Report and check the log intervals of a run without making the host wait for a GPU.

On a GPU, each interval is reported at the end of the next one, when the device has certainly finished it. On
a CPU there is nothing to wait for, and each interval is reported at its own end.
"""

from collections.abc import Callable
from functools import partial

import torch

from trainer.learner import Learner
from trainer.monitor.health import Health
from trainer.monitor.journal import Journal
from trainer.monitor.meter import Interval, Meter
from trainer.processes.distributed import World
from trainer.step import Condition


class Intervals:
    """The log intervals of a run: `meter` measures them, `journal` reports them and `health` checks them.

    With each interval, the processes of the run vote on whether to stop, and whether to save.
    """

    def __init__(self, world: World, learner: Learner, journal: Journal, health: Health):
        self.world, self.learner, self.journal, self.health = world, learner, journal, health
        self.meter = Meter(world, lambda: journal.metrics.storage_wait_seconds)
        self._unreported: Callable[[], None] | None = None
        self._agreed = False, False
        self._save_voted = False  # whether this process has voted to save, and the result is not known

    def end(self, step: int, epoch: float, learning_rate: float, stop: bool, save: bool) -> tuple[bool, bool]:
        """End an interval after `step` steps, and report each interval whose values are ready.

        epoch: number of epochs done. stop, save: the votes of this process. Returns whether any process voted
        to stop, and to save, the same in all processes. On several GPUs, these are the votes that were cast
        with the previous interval. Raises RunError as `report` does.
        """
        self.report()
        is_delayed = self.world.is_asynchronous and self.world.size > 1
        self._save_voted = save = save and not (is_delayed and self._save_voted)
        not_finite, own = self.learner.step.take_condition().split([1, 3])
        votes = torch.tensor([stop, save], dtype=torch.float64, pin_memory=own.is_cuda)
        shared = torch.cat([not_finite, votes.to(own.device, non_blocking=True)])
        self._unreported = partial(self._report, step, epoch, learning_rate, self.meter.harvest(shared, own))
        if not self.world.is_asynchronous:
            self.report()
        if self.world.size == 1:
            return stop, save
        agreed, self._agreed = self._agreed, (False, False)
        return agreed

    def report(self) -> None:
        """Report the last interval if it has not been reported. Raises RunError if the run cannot go on."""
        unreported, self._unreported = self._unreported, None
        if unreported is not None:
            unreported()

    def _report(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        read: Callable[[], tuple[Interval, list[float]]],
    ) -> None:
        interval, (not_finite, stop, save, *own) = read()
        condition = Condition.of([not_finite, *own])
        self._agreed = self._agreed[0] or stop > 0, self._agreed[1] or save > 0
        self.journal.record_interval(step, epoch, learning_rate, condition.scale, interval)
        for warning in self.health.check(interval, condition, epoch, step):
            self.journal.display.say(warning)
