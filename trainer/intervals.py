"""Log intervals: the host goes on at the end of one, and tells what came of it at the end of the next.

The device has long reported by then, so that it is never waited for. On a CPU there is nothing to wait for,
and an interval is told at its own end.
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
    """Those of a run: a meter measures them, the journal tells them, and health judges them."""

    def __init__(self, world: World, learner: Learner, journal: Journal, health: Health):
        self.world, self.learner, self.journal, self.health = world, learner, journal, health
        self.meter = Meter(world)
        self._untold: Callable[[], None] | None = None

    def end(self, step: int, epoch: float, learning_rate: float) -> None:
        """End one after `step` steps. Raises what `tell` does, of this one or the one before."""
        self.tell()
        read = self.meter.harvest(self.learner.step.take_condition())
        self._untold = partial(self._tell, step, epoch, learning_rate, read)
        if not self.world.is_asynchronous:
            self.tell()

    def tell(self) -> None:
        """Tell what has ended, if that has not been done. Raises RunError where the run cannot go on."""
        untold, self._untold = self._untold, None
        if untold is not None:
            untold()

    def _tell(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        read: Callable[[], tuple[Interval, list[float]]],
    ) -> None:
        interval, values = read()
        condition = Condition.of(values)
        self.journal.interval(step, epoch, learning_rate, condition.scale, interval)
        self.health.check(interval, *condition)
        for warning in self.health.warnings(interval, condition.skips, epoch, step):
            self.journal.display.say(warning)
