"""Measure what each part of the net and of its training contributes, by training without it.

    alexnet-train paper ablations --data shards --seeds 3 --recipe small --epochs 20

Each ablation changes one setting and is compared seed by seed. The published differences come from the
paper's text and from the logs of its code. With --rates, each net is trained at the learning rate with the
lowest error on a held-out part of the training images; validation images are only used to measure. Any other
option is a setting of `alexnet-train train`, the same for all runs; a recipe whose learning rate depends on
the number of epochs (schedule `cosine`) suits any budget. Finished runs are not repeated.
"""

import argparse
from typing import NamedTuple

from tools.experiments import rates
from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.experiments.training import Training, about, measured, train_all
from tools.options import add_jobs, add_seeds
from trainer.settings import SettingsError, load_settings

TAKES_SETTINGS = True
WHOLE = "AlexNet"


class Ablation(NamedTuple):
    """A change of settings. top1, top5: published differences from the whole net, in percentage points."""

    settings: tuple[str, ...]
    source: str
    top1: float | None = None
    top5: float | None = None


ABLATIONS = {
    "no LRN": Ablation(("--no-lrn",), "section 3.3", 1.4, 1.2),
    "non-overlapping pooling": Ablation(("--no-overlapping-pooling",), "section 3.4", 0.4, 0.3),
    "one-GPU net": Ablation(("--towers", "1"), "section 3.2", 1.7, 1.2),
    "no colour augmentation": Ablation(("--colour", "off"), "section 4.1: more than 1", 1.0),
    "no crops or flips": Ablation(("--no-crops-and-flips",), "section 4.1: overfits substantially"),
    "no dropout": Ablation(("--dropout", "off"), "section 4.2: overfits substantially"),
    "no weight decay": Ablation(("--weight-decay", "0"), "section 5: a higher training error"),
    "biases begin at 0": Ablation(("--initial-biases", "zeros"), "section 5: slower early learning"),
    "tanh": Ablation(("--activation", "tanh"), "section 3.1: several times slower"),
    **{
        f"without {name}": Ablation(("--without", name), "section 7: about 2", 2.0)
        for name in ("conv2", "conv3", "conv4", "conv5")
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_seeds(parser)
    add_jobs(parser)
    rates.add_arguments(parser)
    add(
        "--only",
        nargs="+",
        choices=list(ABLATIONS),
        metavar="NAME",
        help=f"run only these of {', '.join(ABLATIONS)}",
    )


def run(options: argparse.Namespace, settings: list[str]) -> Record:
    """Train the runs that are not finished; return the record.

    Raises SettingsError, TrainingError, or DatasetError if a part for --rates cannot be held out.
    """
    chosen = {WHOLE: Ablation((), "")} | {
        name: ablation for name, ablation in ABLATIONS.items() if not options.only or name in options.only
    }
    whole = load_settings(settings)
    for name, ablation in chosen.items():
        if name != WHOLE and load_settings([*settings, *ablation.settings]) == whole:
            raise SettingsError(
                f"'{name}' changes nothing with these settings: choose a recipe that has the part which it "
                "removes, or select the other ablations with --only"
            )
    folder = options.out / "ablations"
    own = {name: ablation.settings for name, ablation in chosen.items()}
    trials = rates.sweep(options, settings, own, folder / "rates")
    trainings = [
        Training(
            folder / f"{name.replace(' ', '-')}-{seed}",
            [*settings, "--seed", str(seed), *rates.setting(trials, name), *ablation.settings],
        )
        for seed in range(options.seeds)
        for name, ablation in chosen.items()
    ]
    evaluations = train_all(trainings, options.jobs)
    rows = []
    for number, (name, ablation) in enumerate(chosen.items()):
        published = {TOP1: ablation.top1, TOP5: ablation.top5}
        rows.append(
            Row(
                system=name,
                measured=measured(evaluations[number :: len(chosen)]),
                published={measure: value for measure, value in published.items() if value is not None},
                than="" if name == WHOLE else WHOLE,
                note=ablation.source,
            )
        )
    return Record(
        experiment="ablations",
        title="Ablations",
        source="sections 3, 4 and 7; the logs of layers-147, -148 and -145-half",
        rows=rows,
        remarks=rates.remarks(trials),
        sweep=trials,
        **about(trainings),
    )
