"""Evaluate a run on the validation set: when, with what details, and whether the run should end early."""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from pipeline import EvaluationLoader
from trainer.details import Details, Recorder, Tally
from trainer.evaluate import Scores, evaluate
from trainer.learner import Learner
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World
from trainer.processes.stop import StopRequest
from trainer.settings import Settings


def count_stale(errors: Sequence[float]) -> int:
    """Return the number of evaluations since the lowest error, given the error of each; 0 without any."""
    return len(errors) - 1 - errors.index(min(errors)) if errors else 0


class Validated(NamedTuple):
    """The result of an evaluation.

    by_class: numbers of images and of top-1 errors, by label. is_best: whether its top-1 error is the lowest
    so far. details: of the evaluation that ends the run.
    """

    scores: Scores
    by_class: tuple[list[int], list[int]]
    is_best: bool
    details: Details | None


class Validation:
    """The evaluations of a run on the validation set.

    errors: the top-1 error of each evaluation so far. epochs: number of epochs done at the last of them.
    """

    def __init__(self, settings: Settings, world: World, metrics: Metrics, stop: StopRequest):
        self.settings, self.world, self.metrics, self.stop = settings, world, metrics, stop
        self.errors: list[float] = []
        self.epochs = 0

    def is_due(self, epochs: int, is_last: bool) -> bool:
        """Return whether to evaluate after `epochs` complete epochs.

        is_last: whether training is complete.
        """
        every = 1 if is_last else self.settings.evaluate_epochs
        return epochs // every > self.epochs // every

    @property
    def ends_run(self) -> bool:
        """Whether the error has not fallen for as many evaluations as --stop-after says."""
        return count_stale(self.errors) >= (self.settings.stop_after or math.inf)

    def run(self, learner: Learner, loader: EvaluationLoader, epochs: int, is_last: bool) -> Validated | None:
        """Evaluate after `epochs` complete epochs.

        The details take time, so they are recorded only if this evaluation is the last or may end the run.
        If a process is asked to stop meanwhile, the evaluation ends early, and the result is None.
        """
        may_end_run = count_stale(self.errors) + 1 >= (self.settings.stop_after or math.inf)
        recorder = Recorder(loader) if is_last or may_end_run else None
        tally = Tally(len(loader.dataset.manifest.classes), self.world.device)
        batches = takewhile(lambda _: not self.stop.is_made, loader)
        scores = evaluate(
            learner.model, learner.precision, batches, self.world, self.metrics, recorder, tally
        )
        if self.world.any(self.stop.is_made):
            return None
        is_best = scores.top1_error < min(self.errors, default=math.inf)
        self.errors.append(scores.top1_error)
        self.epochs = epochs
        ends = is_last or self.ends_run
        details = recorder.combine(self.world) if recorder and ends else None
        return Validated(scores, tally.combine(self.world), is_best, details)
