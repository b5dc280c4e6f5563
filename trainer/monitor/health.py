"""Numbers going wrong: found in what each log interval fetches anyway, so that no step waits for it.

A loss or weights that are not finite end the run (`--on-nan stop`). With `--on-nan skip` the update of a
step whose gradients are not finite is left out (trainer/step.py), and the run ends only if that goes on
for MAX_SKIPS steps, or the weights are lost all the same. A loss scale of fp16 under MIN_SCALE ends it
in either case: each step has overflowed since it began at 65,536. A loss that stays at chance is worth a
warning: AlexNet is known not to begin to learn from weights that are too small.

Every checkpoint is saved after such a look at the same step, so none has weights that are not finite.
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
MAX_SKIPS = 100  # one after the other
CHANCE_SHARE = 0.02  # of ln(classes): as near to it as this is chance
CHANCE_EPOCHS, CHANCE_STEPS = 3.0, 1000  # of chance, both, before it is said


class Health:
    """Judges a run's intervals in their order, and counts the unsound ones.

    newest_checkpoint: finds it, if one was saved, to be named.
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
        """Look at an interval that has just ended.

        scale: of fp16's loss, else 1. Raises RunError, which names the last good checkpoint, where the
        run cannot go on; all processes see the same and end together.
        """
        self.metrics.skipped_steps.inc(skips.steps)
        may_skip = ", or continue with --on-nan skip" if self.settings.on_nan == "stop" else ""
        loss_finite = math.isfinite(interval.loss)
        if not (loss_finite and weights_finite):
            self.metrics.unsound["not finite"].inc()
        if not weights_finite:
            self._end("the weights are not finite any more", may_skip)
        if not loss_finite and self.settings.on_nan == "stop":
            self._end(f"the loss of the last {interval.steps} steps is not finite", may_skip)
        if skips.in_a_row >= MAX_SKIPS:
            self._end(f"the gradients of {skips.in_a_row} steps, one after the other, are not finite")
        if scale < MIN_SCALE:
            self.metrics.unsound["overflow"].inc()
            self._end(f"the loss scale of fp16 fell to {scale:g}, and gradients still overflow")

    def _end(self, what: str, or_else: str = "") -> NoReturn:
        saved = self.newest_checkpoint()
        last = f"The last good checkpoint is {saved}" if saved else "No checkpoint has been saved yet"
        raise RunError(
            f"{what}. {last}. Start a run with a lower --learning-rate, a longer --warmup-epochs or "
            f"--precision bf16{or_else}"
        )

    def remember(self, intervals: Iterable[Mapping[str, float]]) -> None:
        """Take up what came before a resume, by rows of metrics.csv: chance goes on where it was."""
        for row in intervals:
            self._at_chance(row["loss"], row["epoch"], int(row["step"]))

    def warnings(self, interval: Interval, skips: Skips, epoch: float, step: int) -> list[str]:
        """What there is to say of an interval that is no error. epoch, step: done."""
        skipped = f"left out: {skips.steps} of the last {interval.steps} updates: gradients are not finite"
        chance = self._at_chance(interval.loss, epoch, step)
        if self._chance_since:
            self.metrics.unsound["chance"].inc()
        return [skipped] * (skips.steps > 0) + chance

    def _at_chance(self, loss: float, epoch: float, step: int) -> list[str]:
        """A warning, once, when the loss has been that of guessing for long since the warm-up."""
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
            f"the loss has stayed at {self.chance:.3f}, as by guessing, for {epochs:.1f} epochs: "
            "the net has not begun to learn. Another --seed, --preset or --learning-rate may"
        ]
