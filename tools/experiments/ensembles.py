"""Average the probabilities of several nets, like the paper's 5 CNNs and 7 CNNs*.

    alexnet-train paper ensembles runs/a-0 runs/a-1 runs/a-2 runs/star-0 --weights 1 1 1 2

Runs with a sixth convolution (--conv6) count as CNNs*. Each net is evaluated on ten crops, as published, or
with --crops 1 on the centre crop. An average is compared with each single net. The interval of the difference
covers other images and other single nets, but not other averages, of which there is one.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from tools.experiments import finished
from tools.experiments.predictions import errors, probabilities, wrong
from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.options import positive
from trainer.settings import SettingsError

TAKES_SETTINGS = False
ONE, ONE_STAR = "1 CNN", "1 CNN*"
PUBLISHED = {  # averages are given as the difference from one CNN
    ONE: {TOP1: 40.7, TOP5: 18.2},
    ONE_STAR: {TOP1: 39.0, TOP5: 16.6},
    "5 CNNs": {TOP1: -2.6, TOP5: -1.8},
    "7 CNNs*": {TOP1: -4.0, TOP5: -2.8},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser, several=True)
    finished.add_split(parser)
    parser.add_argument("--crops", type=int, choices=(1, 10), default=10, help="number of crops (default 10)")
    parser.add_argument(
        "--weights",
        type=positive,
        nargs="+",
        metavar="W",
        help="weight of each run: also report the weighted mean",
    )


def average(probabilities: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> np.ndarray:
    """Average [images,classes] over the nets; the weights need not sum to 1."""
    return np.average(np.stack(probabilities), axis=0, weights=weights)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Evaluate the nets and their averages.

    Raises SettingsError for a wrong number of weights, and what `open_runs` and `probabilities` raise.
    """
    if len(options.runs) < 2:
        raise SettingsError("an ensemble needs at least two runs")
    if options.weights and len(options.weights) != len(options.runs):
        raise SettingsError(f"--weights needs one number for each of the {len(options.runs)} runs")
    opened, scores, labels = finished.open_runs(options, options.split), [], np.empty(0)
    for net in opened:
        found, labels = probabilities(net, options.split, options.crops, options.out)
        scores.append(found)
        print(f"{net.folder.name}: top-1 error {errors(found, labels)[0].mean():.2%}", flush=True)
    stars = [net.trained.settings.conv6 for net in opened]
    return Record(
        experiment="ensembles",
        title="Ensembles",
        source="section 6, table 2",
        rows=rows(scores, stars, labels, options.weights),
        remarks=[
            f"Each net is evaluated on {'ten crops' if options.crops == 10 else 'the centre crop'}.",
            "There is one average of each kind. The interval of its difference allows for other images and "
            "other single nets, but not for other averages.",
        ],
        **opened[0].about(*opened[1:]),
    )


def rows(
    scores: Sequence[np.ndarray], stars: Sequence[bool], labels: np.ndarray, weights: Sequence[float] | None
) -> list[Row]:
    """Return rows for single nets and for averages: of the nets without a sixth convolution, and of all.

    scores: [images,classes] for each net. stars: which nets have a sixth convolution.
    """
    groups = {
        name: [score for score, star in zip(scores, stars, strict=True) if star == starred]
        for name, starred in ((ONE, False), (ONE_STAR, True))
    }
    singles = [
        Row(system=name, wrong=wrong([errors(net, labels) for net in nets]), published=PUBLISHED[name])
        for name, nets in groups.items()
        if nets
    ]

    def averaged(name: str, nets: Sequence[np.ndarray], weights: Sequence[float] | None = None) -> Row:
        # The paper's seven nets are five CNNs and two CNNs*.
        is_other_seven = name == "7 CNNs*" and len(groups[ONE]) != 5
        return Row(
            system=name,
            wrong=wrong([errors(average(nets, weights), labels)]),
            published={} if weights or is_other_seven else PUBLISHED.get(name, {}),
            than=singles[0].system,
            claims={} if weights else {TOP1: f"With the average of {name}, the error is lower (table 2)"},
        )

    averages = [averaged(f"{len(scores)} {'CNNs*' if any(stars) else 'CNNs'}", scores)]
    if any(stars) and len(groups[ONE]) > 1:
        averages.insert(0, averaged(f"{len(groups[ONE])} CNNs", groups[ONE]))
    if weights:
        averages.append(averaged(f"weighted {' : '.join(f'{w:g}' for w in weights)}", scores, weights))
    return singles + averages
