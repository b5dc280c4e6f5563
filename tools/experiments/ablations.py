"""Measure what each part of the net and of its training contributes, by training without it.

    alexnet-train paper ablations --data shards --recipe fast --rates .007 .014 .028

Each ablation changes one setting and is compared seed by seed. The published differences come from the
paper's text and from the logs of its code. With --rates, each net is trained at the learning rate with the
lowest error on a held-out part of the training images; validation images are only used to measure. Any other
option is a setting of `alexnet-train train`, the same for all runs; a recipe whose learning rate depends on
the number of epochs (schedule `cosine`) suits any budget. Finished runs are not repeated.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from tools.experiments import rates
from tools.experiments.forest import forest
from tools.experiments.measuring import GAP, TRAIN, epochs_measure, measures
from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.experiments.training import Training, about, train_all
from tools.options import add_jobs, add_seeds, positive
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

TAKES_SETTINGS = True
WHOLE = "AlexNet"


class Ablation(NamedTuple):
    """A change of settings, and the row that it gives, without measures."""

    settings: tuple[str, ...]
    row: Row


def ablations(target: float) -> list[Ablation]:
    """Return the ablations. target: the validation error, in percent, that tells how soon a net learns."""
    early = epochs_measure(target)

    def less(system: str, *settings: str, section: str, **row: Any) -> Ablation:
        return Ablation(settings, Row(system=system, than=WHOLE, note=f"section {section}", **row))

    return [
        less(
            "no LRN",
            "--no-lrn",
            section="3.3",
            claims={TOP1: "Without normalisation, the error is higher (3.3)"},
            published={TOP1: 1.4, TOP5: 1.2},
        ),
        less(
            "non-overlapping pooling",
            "--no-overlapping-pooling",
            "--released-pooling",
            section="3.4; layers-147, with its padding",
            claims={TOP1: "With pooling that does not overlap, the error is higher (3.4)"},
            published={TOP1: 0.4, TOP5: 0.3},
        ),
        less(
            "one-GPU net",
            "--towers",
            "1",
            section="3.2",
            claims={TOP1: "With the net of one GPU, the error is higher (3.2)"},
            published={TOP1: 1.7, TOP5: 1.2},
        ),
        less(
            "no colour augmentation",
            "--colour",
            "off",
            section="4.1: more than 1",
            claims={TOP1: "Without colour augmentation, the error is higher (4.1)"},
            published={TOP1: 1.0},
        ),
        less(
            "no crops or flips",
            "--no-crops-and-flips",
            section="4.1: overfits substantially",
            claims={GAP: "Without crops and mirror images, the net overfits more (4.1)"},
            signs={GAP: 1},
        ),
        less(
            "no dropout",
            "--dropout",
            "off",
            section="4.2: overfits substantially; dropout doubles the iterations",
            claims={
                GAP: "Without dropout, the net overfits more (4.2)",
                early: "Without dropout, the net learns in fewer iterations (4.2)",
            },
            signs={GAP: 1, early: -1},
        ),
        less(
            "no weight decay",
            "--weight-decay",
            "0",
            section="5",
            claims={TRAIN: "Without weight decay, even the training error is higher (5)"},
            signs={TRAIN: 1},
        ),
        less(
            "biases begin at 0",
            "--initial-biases",
            "zeros",
            section="5",
            claims={early: "With biases of 0 instead of 1, early learning is slower (5)"},
            signs={early: 1},
        ),
        less(
            "tanh",
            "--activation",
            "tanh",
            section="3.1: several times slower",
            claims={early: "With tanh, the net learns more slowly (3.1)"},
            signs={early: 1},
        ),
        *(
            less(
                f"without {name}",
                "--without",
                name,
                section="7: about 2",
                claims={TOP1: f"Without {name}, the error is higher (7)"},
                published={TOP1: 2.0},
            )
            for name in ("conv2", "conv3", "conv4", "conv5")
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_seeds(parser, 5, ", as few as verdicts need")
    add_jobs(parser)
    rates.add_arguments(parser)
    add(
        "--target",
        type=positive,
        default=50.0,
        metavar="PERCENT",
        help="validation error on the centre crop that tells how soon a net learns (default 50)",
    )
    names = [ablation.row.system for ablation in ablations(50)]
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"run only these of {', '.join(names)}")


def run(options: argparse.Namespace, settings: list[str]) -> Record:
    """Train the runs that are not finished, and measure all; return the record.

    Raises SettingsError, TrainingError, or DatasetError if a part for --rates cannot be held out.
    """
    chosen = [Ablation((), Row(system=WHOLE))] + [
        ablation
        for ablation in ablations(options.target)
        if not options.only or ablation.row.system in options.only
    ]
    whole = load_settings(settings)
    for changed, row in chosen[1:]:
        if load_settings([*settings, *changed]) == whole:
            raise SettingsError(
                f"'{row.system}' changes nothing with these settings: choose a recipe that has the part that "
                "it removes, or select the other ablations with --only"
            )
    folder = options.out / "ablations"
    sweep = rates.sweep(options, settings, {row.system: own for own, row in chosen}, folder / "rates")
    trainings = [
        Training(
            folder / f"{row.system.replace(' ', '-')}-{seed}",
            [*settings, "--seed", str(seed), *sweep.setting(row.system), *changed],
        )
        for seed in range(options.seeds)
        for changed, row in chosen
    ]
    train_all(trainings, options.jobs)
    rows = []
    for number, (_, row) in enumerate(chosen):
        runs = [training.folder for training in trainings[number :: len(chosen)]]
        rows.append(row.model_copy(update=measures(runs, options.target, options.out)))
    record = Record(
        experiment="ablations",
        title="Ablations",
        source="sections 3 to 5 and 7; the logs of layers-147, -148 and -145-half",
        rows=rows,
        remarks=[
            "The top-1 and top-5 errors are those of ten crops.",
            *sweep.remarks(),
            *slow(rows, options.target),
        ],
        sweep=sweep.trials,
        **about(trainings),
    )
    return record.model_copy(update={"figures": [forest(options.out / "ablations.png", record, TOP1)]})


def slow(rows: Sequence[Row], target: float) -> list[str]:
    """Return a remark on the nets of which a seed never reached the target, in percent."""
    names = [row.system for row in rows if epochs_measure(target) not in row.measures]
    if not names:
        return []
    return [f"At least one seed did not reach a validation error of {target:g} % in: {', '.join(names)}."]
