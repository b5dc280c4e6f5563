"""Choose the learning rate of each net by its error on a held-out part of the training images."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from pipeline.manifest import read_manifest
from pipeline.remote_errors import redact
from tools.experiments.held_out import hold_out
from tools.experiments.record import Trial
from tools.experiments.training import Training, TrainingError, train_all
from tools.options import count, positive
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError


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


def trial_epochs(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Return the number of epochs of each trial, given the settings of the runs whose rate is chosen."""
    return options.rate_epochs or max(1, load_settings(settings).epochs // 3)


class Sweep(NamedTuple):
    """The trials of all systems; none if no rates were tried. budget: in words."""

    trials: list[Trial]
    budget: str

    def best(self, system: str) -> float | None:
        """Return the system's rate with the lowest error, the lower rate in a tie; None if none was tried.

        Raises TrainingError if all diverged.
        """
        own = [trial for trial in self.trials if trial.system == system]
        if not own:
            return None
        found = [(trial.error, trial.rate) for trial in own if trial.error is not None]
        if not found:
            raise TrainingError(f"{system} diverged at each of --rates: add lower ones")
        return min(found)[1]

    def setting(self, system: str) -> list[str]:
        """Return the setting of the system's best rate, or none if no rates were tried."""
        rate = self.best(system)
        return [] if rate is None else ["--learning-rate", str(rate)]

    def remarks(self) -> list[str]:
        """Return the budget, and the systems whose best rate is an end of the range."""
        if not self.trials:
            return []
        rates = {trial.rate for trial in self.trials}
        systems = dict.fromkeys(trial.system for trial in self.trials)
        ends = [name for name in systems if self.best(name) in (min(rates), max(rates))]
        if len(rates) < 2 or not ends:
            return [self.budget]
        which = ", ".join(ends)
        return [
            self.budget,
            f"The best learning rate tried is an end of the range for {which}: one beyond it may be better.",
        ]


def sweep(
    options: argparse.Namespace, settings: Sequence[str], systems: Mapping[str, Sequence[str]], folder: Path
) -> Sweep:
    """Train each system, given by its own settings, at each of --rates with seed 0.

    Without --rates, nothing is trained. The runs are in the folder; those that finished or diverged are not
    repeated. Raises SettingsError, DatasetError and TrainingError.
    """
    if not options.rates:
        return Sweep([], "")
    whole = load_settings(settings).data
    if not isinstance(whole, Path):
        raise SettingsError(f"--rates needs a dataset on this machine: copy {redact(whole)} to a folder")
    epochs, data = trial_epochs(options, settings), hold_out(whole, folder)
    common = ["--data", str(data), "--seed", "0", "--epochs", str(epochs)]
    pairs = list(product(systems, sorted(set(options.rates))))
    trainings = [
        Training(
            folder / f"{name.replace(' ', '-')}-{rate:g}",
            [*settings, *systems[name], *common, "--learning-rate", str(rate)],
        )
        for name, rate in pairs
    ]
    evaluations = train_all(trainings, options.jobs, may_diverge=True)
    errors = [100 * evaluation["top1_error"] for evaluation in evaluations]
    held_out = read_manifest(data).split("val").samples
    return Sweep(
        [
            Trial(system=name, rate=rate, error=error if isfinite(error) else None)
            for (name, rate), error in zip(pairs, errors, strict=True)
        ],
        f"Learning rates were chosen in trials of {epochs} epoch{'s' if epochs > 1 else ''} with seed 0, by "
        f"the error on {held_out:,} training images that the trials did not learn from.",
    )
