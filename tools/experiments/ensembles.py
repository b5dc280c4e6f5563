"""Averages of several nets' probabilities, as the paper's 5 CNNs and 7 CNNs*.

    python tools/paper.py ensembles runs/a-0 runs/a-1 runs/a-2 runs/star-0 --weights 1 1 1 2

Runs with a sixth convolution (--conv6) count as CNNs*. Ten crops each, as published; --crops 1 takes the
centre. An average is compared with each single net: its sign is said where it is better, or worse, than all.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from tools.experiments import finished
from tools.experiments.predictions import errors, probabilities, transposed
from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.options import positive
from trainer.settings import SettingsError

TAKES_SETTINGS = False
ONE, ONE_STAR = "1 CNN", "1 CNN*"
PUBLISHED = {  # of averages, the difference to one CNN
    ONE: {TOP1: 40.7, TOP5: 18.2},
    ONE_STAR: {TOP1: 39.0, TOP5: 16.6},
    "5 CNNs": {TOP1: -2.6, TOP5: -1.8},
    "7 CNNs*": {TOP1: -4.0, TOP5: -2.8},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser, several=True)
    parser.add_argument("--crops", type=int, choices=(1, 10), default=10, help="default 10")
    parser.add_argument(
        "--weights", type=positive, nargs="+", metavar="W", help="of the runs, for a weighted mean too"
    )


def average(probabilities: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Mean of [images,classes] over the nets; weights need not sum to 1."""
    return np.average(np.stack(probabilities), axis=0, weights=weights)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Evaluate the nets and their averages. Raises SettingsError for weights that do not fit, and what
    `open_run` and `probabilities` do."""
    if len(options.runs) < 2:
        raise SettingsError("an ensemble takes two runs or more")
    if options.weights and len(options.weights) != len(options.runs):
        raise SettingsError(f"--weights takes a number for each of the {len(options.runs)} runs")
    opened, scores, labels = finished.open_runs(options), [], np.empty(0)
    for net in opened:
        found, labels = probabilities(net, options.split, options.crops, options.out)
        scores.append(found)
        print(f"{net.folder.name}: top-1 error {errors(found, labels)[TOP1]:.2f} %", flush=True)
    stars = [net.trained.settings.conv6 for net in opened]
    return Record(
        experiment="ensembles",
        title="Ensembles",
        source="section 6, table 2",
        rows=rows(scores, stars, labels, options.weights),
        remarks=[f"{options.crops} crop{'s' * (options.crops > 1)} each."],
        **opened[0].about(*opened[1:]),
    )


def rows(
    scores: Sequence[np.ndarray], stars: Sequence[bool], labels: np.ndarray, weights: Sequence[float] | None
) -> list[Row]:
    """Single nets and their averages: of those without a sixth convolution, and of all.

    scores: [images,classes] of each net. stars: which have a sixth convolution.
    """
    groups = {
        name: [score for score, star in zip(scores, stars, strict=True) if star == starred]
        for name, starred in ((ONE, False), (ONE_STAR, True))
    }
    singles = [
        Row(
            system=name, measured=transposed([errors(net, labels) for net in nets]), published=PUBLISHED[name]
        )
        for name, nets in groups.items()
        if nets
    ]

    def averaged(name: str, nets: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> Row:
        measured = transposed([errors(average(nets, weights), labels)])
        published = {} if weights else PUBLISHED.get(name, {})
        return Row(system=name, measured=measured, published=published, than=singles[0].system)

    averages = [averaged(f"{len(scores)} {'CNNs*' if any(stars) else 'CNNs'}", scores)]
    if any(stars) and len(groups[ONE]) > 1:
        averages.insert(0, averaged(f"{len(groups[ONE])} CNNs", groups[ONE]))
    if weights:
        averages.append(averaged(f"weighted {' : '.join(f'{w:g}' for w in weights)}", scores, weights))
    return singles + averages
