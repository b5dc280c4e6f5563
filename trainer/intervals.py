"""Report and check the log intervals of a run without making the host wait for a GPU.

On a GPU, each interval is reported at the end of the next one, when the device has certainly finished it. On
a CPU there is nothing to wait for, and each interval is reported at its own end.
"""

from collections.abc import Callable
from functools import partial

from trainer.learner import Learner
from trainer.monitor.health import Health
from trainer.monitor.journal import Journal
from trainer.monitor.meter import Interval, Meter
from trainer.processes.distributed import World
from trainer.step import Condition


class Intervals:
    """The log intervals of a run: `meter` measures them, `journal` reports them and `health` checks them."""

    def __init__(self, world: World, learner: Learner, journal: Journal, health: Health):
        self.world, self.learner, self.journal, self.health = world, learner, journal, health
        self.meter = Meter(world, lambda: journal.metrics.storage_wait_seconds)
        self._unreported: Callable[[], None] | None = None

    def end(self, step: int, epoch: float, learning_rate: float) -> None:
        """End an interval after `step` steps, and report each interval whose values are ready.

        epoch: number of epochs done. Raises RunError as `report` does.
        """
        self.report()
        read = self.meter.harvest(self.learner.step.take_condition())
        self._unreported = partial(self._report, step, epoch, learning_rate, read)
        if not self.world.is_asynchronous:
            self.report()

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
        interval, values = read()
        condition = Condition.of(values)
        self.journal.record_interval(step, epoch, learning_rate, condition.scale, interval)
        for warning in self.health.check(interval, condition, epoch, step):
            self.journal.display.say(warning)
