"""Numerical checks of a run, on values that each log interval fetches anyway, so no step waits for them.

A loss or weights that are not finite end the run with `--on-nan stop`. With `--on-nan skip`, a step whose
gradients are not finite skips its update (trainer/step.py), and the run ends only if MAX_SKIPS steps in a row
do so, or if the weights become non-finite nevertheless. An fp16 loss scale below MIN_SCALE ends the run in
either case, since it began at 65,536 and every step has overflowed. A loss that stays at chance level gives a
warning: AlexNet is known not to start learning if its initial weights are too small.

Every checkpoint is saved after a check at the same step, so none contains weights that are not finite.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.run import RunError
from trainer.settings import Settings
from trainer.step import Skips

MIN_SCALE = 1.0
MAX_SKIPS = 100  # in a row
CHANCE_SHARE = 0.02  # of ln(classes); a loss within this distance of it is at chance level
CHANCE_EPOCHS, CHANCE_STEPS = 3.0, 1000  # at chance level before a warning; both must be exceeded


class Health:
    """Checks the intervals of a run in their order, and counts the unsound ones.

    newest_checkpoint: returns the newest checkpoint, if any, to name it in error messages.
    """

    def __init__(
        self,
        settings: Settings,
        classes: int,
        newest_checkpoint: Callable[[], Path | None],
        metrics: Metrics,
    ):
        self.settings, self.newest_checkpoint, self.metrics = settings, newest_checkpoint, metrics
        self.chance = math.log(classes)
        self._chance_since: tuple[float, int] | None = None  # epoch and step
        self._warned = False

    def check(self, interval: Interval, weights_finite: bool, scale: float, skips: Skips) -> None:
        """Check an interval that has just ended.

        scale: the loss scale in fp16, otherwise 1. Raises RunError, which names the last good checkpoint, if
        the run cannot go on. All processes see the same values, and so end together.
        """
        self.metrics.skipped_steps.inc(skips.steps)
        may_skip = ", or continue this one with --on-nan skip" if self.settings.on_nan == "stop" else ""
        loss_finite = math.isfinite(interval.loss)
        if not (loss_finite and weights_finite):
            self.metrics.unsound["not finite"].inc()
        if not weights_finite:
            self._end("the weights are no longer finite", may_skip)
        if not loss_finite and self.settings.on_nan == "stop":
            self._end(f"the loss of the last {interval.steps} steps is not finite", may_skip)
        if skips.in_a_row >= MAX_SKIPS:
            self._end(f"the gradients of {skips.in_a_row} steps in a row are not finite")
        if scale < MIN_SCALE:
            self.metrics.unsound["overflow"].inc()
            self._end(f"the fp16 loss scale fell to {scale:g}, and gradients still overflow")

    def _end(self, what: str, or_else: str = "") -> NoReturn:
        saved = self.newest_checkpoint()
        last = f"The last good checkpoint is {saved}" if saved else "No checkpoint has been saved yet"
        raise RunError(
            f"{what}. {last}. Start a new run with a lower --learning-rate, a longer --warmup-epochs or "
            f"--precision bf16{or_else}"
        )

    def remember(self, intervals: Iterable[Mapping[str, float]]) -> None:
        """Restore the time at chance level from the rows of metrics.csv before a resume."""
        for row in intervals:
            self._track_chance(row["loss"], row["epoch"], int(row["step"]))

    def assess(self, interval: Interval, skips: Skips, epoch: float, step: int) -> list[str]:
        """Count what is wrong with an interval without ending the run. Returns warnings for the log.

        epoch, step: those done at its end.
        """
        skipped = f"skipped {skips.steps} of the last {interval.steps} updates: gradients were not finite"
        chance = self._track_chance(interval.loss, epoch, step)
        if self._chance_since:
            self.metrics.unsound["chance"].inc()
        return [skipped] * (skips.steps > 0) + chance

    def _track_chance(self, loss: float, epoch: float, step: int) -> list[str]:
        """Follow how long the loss has been at chance level since the warm-up, and warn once if too long."""
        near = abs(loss - self.chance) <= CHANCE_SHARE * self.chance
        if not near or epoch < self.settings.warmup_epochs:
            self._chance_since = None
            return []
        since_epoch, since_step = self._chance_since = self._chance_since or (epoch, step)
        epochs, steps = epoch - since_epoch, step - since_step
        if self._warned or epochs < CHANCE_EPOCHS or steps < CHANCE_STEPS:
            return []
        self._warned = True
        return [
            f"the loss has stayed at {self.chance:.3f}, the level of guessing, for {epochs:.1f} epochs: "
            "the net has not started to learn. Try another --seed, --preset or --learning-rate"
        ]
