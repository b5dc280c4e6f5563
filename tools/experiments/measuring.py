"""Measure finished runs: errors with ten crops, overfitting, and how soon they learned."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.experiments.finished import open_net
from tools.experiments.record import TOP1
from trainer.run import Run

CENTRE = "top-1 error, centre crop (%)"
TRAIN = "training top-1 error, centre crop (%)"
GAP = "validation minus training error, centre crop (points)"


def epochs_measure(target: float) -> str:
    """Return the name of the measure of early learning. target: in percent."""
    return f"epochs to a validation error of {target:g} %"


def measures(runs: Sequence[Path], target: float | None, out: Path) -> dict[str, Any]:
    """Return a row's fields with the measures of a system's runs, one for each seed.

    The top-1 and top-5 errors are those of ten crops (section 4.1); training errors are measured on the
    finished net, without dropout and augmentation. The measure of early learning is left out if there is no
    target, in percent, or if a run does not reach it. Predictions are kept under `out`. Raises what
    `open_net` and `errors_of` raise.
    """
    from tools.experiments.predictions import errors_of, wrong

    ten, centre, train = [], [], []
    for folder in runs:
        opened = open_net(folder, "train", "val", device=Run(folder).settings().device)
        ten.append(errors_of(opened, "val", 10, out))
        centre.append(errors_of(opened, "val", 1, out))
        train.append(100 * errors_of(opened, "train", 1, out)[0].mean())
        print(f"{folder.name}: top-1 error {ten[-1][0].mean():.1%} with ten crops", flush=True)
    measured = {TRAIN: train}
    if target is not None:
        epochs = [epochs_to(Run(folder).evaluations.rows(), target / 100) for folder in runs]
        if max(epochs) < math.inf:
            measured[epochs_measure(target)] = epochs
    return {
        "wrong": wrong(ten) | {CENTRE: wrong(centre)[TOP1]},
        "measured": measured,
        "gaps": {GAP: (CENTRE, TRAIN)},
    }


def epochs_to(evaluations: Sequence[dict[str, float]], target: float) -> float:
    """Return the number of epochs until the validation error is at most the target, or infinity.

    target: from 0 to 1. Between two evaluations, the error is interpolated linearly.
    """
    if evaluations and evaluations[0]["top1_error"] <= target:
        return evaluations[0]["epoch"]
    for before, after in pairwise(evaluations):
        if after["top1_error"] <= target:
            share = (before["top1_error"] - target) / (before["top1_error"] - after["top1_error"])
            return before["epoch"] + share * (after["epoch"] - before["epoch"])
    return math.inf
