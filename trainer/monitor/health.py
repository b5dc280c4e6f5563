"""Check after each log interval that the loss, the weights and the gradients of a run are sound.

The values to check are copied from the device once per interval, so no step waits for a check.

With `--on-nan stop`, a loss or weights that are not finite end the run. With `--on-nan skip`, a step whose
gradients are not finite skips its update (trainer/step.py), and the run ends only after MAX_SKIPS consecutive
skips, or if the weights become non-finite nevertheless. An fp16 loss scale below MIN_SCALE ends the run in
either case: the scale began at 65,536 and was halved at each overflow. A loss that stays at chance level
causes a warning, because AlexNet may not start learning if its initial weights are too small.

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
from trainer.step import Condition

MIN_SCALE = 1.0
MAX_SKIPS = 100  # consecutive steps
CHANCE_TOLERANCE = 0.02  # a loss within this fraction of ln(classes) is at chance level
CHANCE_EPOCHS, CHANCE_STEPS = 3.0, 1000  # a warning is given after both of these at chance level


class Health:
    """Checks the log intervals of a run in their order, and counts the unsound ones.

    newest_checkpoint: returns the path of the newest checkpoint, if any, to name it in error messages.
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

    def check(self, interval: Interval, condition: Condition, epoch: float, step: int) -> list[str]:
        """Check an interval that has just ended, and count it if it is unsound. Returns warnings for the log.

        epoch, step: number of epochs and steps done at its end. Raises RunError, which names the last good
        checkpoint, if the run cannot go on. All processes see the same values, and so end together.
        """
        weights_finite, scale, skips = condition
        self.metrics.skipped_steps.inc(skips.steps)
        may_skip = ", or continue this one with --on-nan skip" if self.settings.on_nan == "stop" else ""
        loss_finite = math.isfinite(interval.loss)
        if not (loss_finite and weights_finite):
            self.metrics.unsound["not finite"].inc()
        if not weights_finite:
            self._end("the weights are no longer finite", may_skip)
        if not loss_finite and self.settings.on_nan == "stop":
            self._end(f"the loss of the last {interval.steps} steps is not finite", may_skip)
        if skips.consecutive >= MAX_SKIPS:
            self._end(f"the gradients of {skips.consecutive} consecutive steps are not finite")
        if scale < MIN_SCALE:
            self.metrics.unsound["overflow"].inc()
            self._end(f"the fp16 loss scale fell to {scale:g}, and gradients still overflow")
        chance_warnings = self._track_chance(interval.loss, epoch, step)
        if self._chance_since:
            self.metrics.unsound["chance"].inc()
        skipped = f"skipped {skips.steps} of the last {interval.steps} updates: gradients were not finite"
        # In fp16, occasional overflows are normal: they are how the loss scale is found.
        unusual = skips.steps > 0 and self.settings.precision != "fp16"
        return [skipped] * unusual + chance_warnings

    def _end(self, problem: str, alternative: str = "") -> NoReturn:
        saved = self.newest_checkpoint()
        last = f"The last good checkpoint is {saved}" if saved else "No checkpoint has been saved yet"
        raise RunError(
            f"{problem}. {last}. Start a new run with a lower --learning-rate, a longer --warmup-epochs or "
            f"--precision bf16{alternative}"
        )

    def restore(self, intervals: Iterable[Mapping[str, float]]) -> None:
        """Restore, when a run is continued, the time spent at chance level from the rows of metrics.csv."""
        for row in intervals:
            self._track_chance(row["loss"], row["epoch"], int(row["step"]))

    def _track_chance(self, loss: float, epoch: float, step: int) -> list[str]:
        """Track how long the loss has been at chance level since the warm-up.

        Returns a warning once, when it has been there for too long.
        """
        near = self.chance > 0 and abs(loss - self.chance) <= CHANCE_TOLERANCE * self.chance
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
