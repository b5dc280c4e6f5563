"""Repeat CNN*: a net with a sixth convolution, pre-trained on a larger dataset and then fine-tuned.

    alexnet-train paper cnn-star --pretrain fall2011 --data shards --recipe code2012 --seeds 2

For each seed there are four runs: the published net; the net with a sixth convolution, from random weights;
that net trained on --pretrain, whose classes are its own; and that net continued on --data with a new fc8. As
in the code of 2012, fine-tuning starts at a tenth of the learning rate, and conv1 at a hundredth. Any other
option is a setting of `alexnet-train train` for all runs; --pretrain-settings and --fine-tune-settings add
settings for one. Finished runs are not repeated.
"""

import argparse
import shlex
from pathlib import Path

from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.experiments.training import Training, about, describe, measured, train_all
from tools.options import add_jobs, add_seeds
from trainer.settings import load_settings

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pretrain", type=Path, required=True, metavar="DIR", help="packed dataset to pre-train on")
    add(
        "--pretrain-settings",
        default="",
        metavar="SETTINGS",
        help='more settings for pre-training, such as "--epochs 3"',
    )
    add("--fine-tune-settings", default="", metavar="SETTINGS", help="more settings for fine-tuning")
    add_seeds(parser, 2, ", as published")
    add_jobs(parser)


def run(options: argparse.Namespace, settings: list[str]) -> Record:
    """Train those of the four nets that are not finished. Raises SettingsError or TrainingError."""
    rate = load_settings(settings).learning_rate
    seeds, folder = range(options.seeds), options.out / "cnn-star"

    def trainings(name: str, *more: str) -> list[Training]:
        return [
            Training(folder / f"{name}-{seed}", [*settings, "--seed", str(seed), *more]) for seed in seeds
        ]

    one, random = trainings("one"), trainings("conv6", "--conv6")
    pretraining = ["--conv6", "--data", str(options.pretrain), *shlex.split(options.pretrain_settings)]
    first = trainings("pretrained", *pretraining)
    smaller = ["--learning-rate", str(rate / 10), "--layer-learning-rates", "conv1=0.1"]
    fine_tuning = ["--conv6", *smaller, *shlex.split(options.fine_tune_settings)]
    star = [
        Training(folder, [*settings, "--initial-weights", str(before.folder)])
        for (folder, settings), before in zip(trainings("star", *fine_tuning), first, strict=True)
    ]
    # All pre-training comes before any fine-tuning, which needs its weights.
    before = train_all([*one, *random, *first], options.jobs)
    after = train_all(star, options.jobs)
    count = len(seeds)
    return Record(
        experiment="cnn-star",
        title="CNN*",
        source="section 6, table 2; the log of layers-146",
        rows=[
            Row(system="1 CNN", measured=measured(before[:count]), published={TOP1: 40.7, TOP5: 18.2}),
            Row(
                system="with a sixth convolution, from random weights",
                measured=measured(before[count : 2 * count]),
                than="1 CNN",
            ),
            Row(system="1 CNN*", measured=measured(after), published={TOP1: -1.7, TOP5: -1.6}, than="1 CNN"),
        ],
        remarks=[
            f"Pre-trained on {describe(options.pretrain)}. Measured on the centre crop; the published errors "
            "are those of ten crops."
        ],
        **about([*one, *star]),
    )
