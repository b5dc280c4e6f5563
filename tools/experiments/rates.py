"""Choose the learning rate of each net by its error on a held-out part of the training images."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from math import isfinite
from pathlib import Path

from tools.experiments.held_out import hold_out
from tools.experiments.record import Trial
from tools.experiments.training import Training, TrainingError, train_all
from tools.options import count, positive
from trainer.settings import load_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        type=positive,
        nargs="+",
        metavar="R",
        help="learning rates to try for each net, on a held-out tenth of the training shards (default: the "
        "rate of the settings for all nets)",
    )
    parser.add_argument(
        "--rate-epochs",
        type=count,
        metavar="N",
        help="epochs of each trial of a rate (default: a third of the epochs)",
    )


def sweep(
    options: argparse.Namespace, settings: Sequence[str], systems: Mapping[str, Sequence[str]], folder: Path
) -> list[Trial]:
    """Train each system, given by its own settings, at each of --rates with seed 0.

    Without --rates, nothing is trained. The runs are in the folder; those that finished or diverged are not
    repeated. Raises SettingsError, DatasetError and TrainingError.
    """
    if not options.rates:
        return []
    chosen = load_settings(settings)
    common = ["--data", str(hold_out(chosen.data, folder)), "--seed", "0"]
    common += ["--epochs", str(options.rate_epochs or max(1, chosen.epochs // 3))]
    pairs = list(product(systems, options.rates))
    trainings = [
        Training(
            folder / f"{name.replace(' ', '-')}-{rate:g}",
            [*settings, *systems[name], *common, "--learning-rate", str(rate)],
        )
        for name, rate in pairs
    ]
    evaluations = train_all(trainings, options.jobs, may_diverge=True)
    errors = [100 * evaluation["top1_error"] for evaluation in evaluations]
    return [
        Trial(system=name, rate=rate, error=error if isfinite(error) else None)
        for (name, rate), error in zip(pairs, errors, strict=True)
    ]


def best(trials: Sequence[Trial], system: str) -> float | None:
    """Return the system's rate with the lowest error, the lower rate in a tie; None if none was tried.

    Raises TrainingError if all diverged.
    """
    own = [trial for trial in trials if trial.system == system]
    if not own:
        return None
    found = [(trial.error, trial.rate) for trial in own if trial.error is not None]
    if not found:
        raise TrainingError(f"{system} diverged at each of --rates: add lower ones")
    return min(found)[1]


def setting(trials: Sequence[Trial], system: str) -> list[str]:
    """Return the setting of the system's best rate, or none if no rates were tried."""
    rate = best(trials, system)
    return [] if rate is None else ["--learning-rate", str(rate)]


def remarks(trials: Sequence[Trial]) -> list[str]:
    """Name the systems whose best rate is an end of the range, beyond which a better one may lie."""
    rates = [trial.rate for trial in trials]
    systems = dict.fromkeys(trial.system for trial in trials)
    ends = [name for name in systems if best(trials, name) in (min(rates), max(rates))]
    if len(set(rates)) < 2 or not ends:
        return []
    return [
        f"The best learning rate tried is an end of the range for {', '.join(ends)}: "
        "one beyond it may be better."
    ]
