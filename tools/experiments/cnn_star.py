"""Repeat CNN*: a net with a sixth convolution, pre-trained on a larger dataset and then fine-tuned.

    alexnet-train paper cnn-star --pretrain fall2011 --data shards --recipe code2012 --rates 0.005 0.01 0.02

For each seed there are five runs: the published net; the net with a sixth convolution, from random weights;
that net trained on --pretrain, whose classes are its own; and that net continued on --data with a new fc8,
once as in 2012 and once as is usual now. The schedule of 2012 is that of layer-params-146-2012-2011.cfg, with
its 54 epochs scaled to --epochs: fc8 soon trains at the full learning rate, conv1 at a hundredth until it is
frozen, and the other layers at a tenth. The usual way is the schedule of the recipe, at the full learning
rate except for a tenth of it in conv1 and three tenths in conv2.

With --rates, each net is trained at the learning rate with the lowest error on a held-out part of its
training images; validation images are only used to measure. Any other option is a setting of `alexnet-train
train` for all runs; --pretrain-settings and --fine-tune-settings add settings for some. Finished runs are not
repeated.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from tools.experiments import rates
from tools.experiments.markdown import bounds
from tools.experiments.measuring import measures
from tools.experiments.record import TOP1, TOP5, Record, Result, Row
from tools.experiments.training import Training, about, describe, train_all
from tools.options import add_jobs, add_seeds
from trainer.setting_sources import load_settings

TAKES_SETTINGS = True
PRETRAINED = "pre-training"
ONE, RANDOM = "1 CNN", "conv6 from random weights"
AS_IN_2012, AS_USUAL = "pre-trained and fine-tuned as in 2012", "pre-trained and fine-tuned as is usual now"
PUBLISHED: dict[str, dict[str, Any]] = {ONE: {"published": {TOP1: 40.7, TOP5: 18.2}}} | {
    name: {
        "published": {TOP1: -1.7, TOP5: -1.6},
        "claims": {TOP1: f"CNN*, {name}, has a lower error than the CNN (table 2)"},
    }
    for name in (AS_IN_2012, AS_USUAL)
}
EPOCHS_OF_2012 = 54
EARLY_LAYERS = ("--layer-learning-rates", "conv1=0.1,conv2=0.3")


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
    add_seeds(parser, 5)
    add_jobs(parser)
    rates.add_arguments(parser)


def run(options: argparse.Namespace, settings: list[str]) -> Record:
    """Train those of the nets that are not finished, and measure all but the pre-trained ones.

    Raises SettingsError, TrainingError, or DatasetError if a part for --rates cannot be held out.
    """
    seeds, folder = range(options.seeds), options.out / "cnn-star"
    first = [*settings, "--conv6", "--data", str(options.pretrain), *shlex.split(options.pretrain_settings)]
    before = rates.sweep(options, first, {PRETRAINED: ()}, folder / "rates")
    rate = before.setting(PRETRAINED)
    pretrained = [
        Training(folder / f"{PRETRAINED}-{seed}", [*first, "--seed", str(seed), *rate]) for seed in seeds
    ]
    train_all(pretrained, options.jobs)

    tuned = shlex.split(options.fine_tune_settings)
    tried = systems(pretrained[0].folder, tuned, rates.trial_epochs(options, settings))
    after = rates.sweep(options, settings, tried, folder / "rates")
    epochs = load_settings([*settings, *tuned]).epochs
    trainings = [
        Training(
            folder / f"{name.replace(' ', '-')}-{seed}",
            [*settings, "--seed", str(seed), *after.setting(name), *own],
        )
        for seed in seeds
        for name, own in systems(pretrained[seed].folder, tuned, epochs).items()
    ]
    train_all(trainings, options.jobs)
    rows = []
    for number, name in enumerate(tried):
        runs = [training.folder for training in trainings[number :: len(tried)]]
        own = PUBLISHED.get(name, {}) | measures(runs, None, options.out)
        rows.append(Row(system=name, than="" if name == ONE else ONE, **own))
    return Record(
        experiment="cnn-star",
        title="CNN*",
        source="section 6, table 2; layer-params-146-2012-2011.cfg, lines 181 to 193",
        rows=rows,
        remarks=[
            f"Pre-trained on {describe(options.pretrain)}.",
            "The top-1 and top-5 errors are those of ten crops.",
            *(against_random(row, rows[1]) for row in rows[2:]),
            *(f"Pre-training: {remark}" for remark in before.remarks()),
            *after.remarks(),
        ],
        sweep=[*before.trials, *after.trials],
        **about([*trainings, *pretrained]),
    )


def systems(before: Path, tuned: list[str], epochs: int) -> dict[str, list[str]]:
    """Return the settings of each net that is trained on --data.

    before: the run folder of the pre-trained net. tuned: more settings for fine-tuning. epochs: the number of
    epochs of fine-tuning.
    """
    star = ["--conv6", "--initial-weights", str(before), *tuned]
    return {
        ONE: [],
        RANDOM: ["--conv6"],
        AS_IN_2012: [*star, *as_in_2012(epochs)],
        AS_USUAL: [*EARLY_LAYERS, *star],
    }


def against_random(star: Row, random: Row) -> str:
    """Say how far a pre-trained net's top-1 error is from that of the same net from random weights."""
    found = Result(star.table(TOP1) - random.table(TOP1), 0)
    ends = f" (95 %: {bounds(found.interval, True)})" if found.interval else ""
    return f"Top-1 error of the net {star.system}, minus that with {random.system}: {found.mean:+.2f}{ends}."


def as_in_2012(epochs: int) -> list[str]:
    """Return the settings of 2012's fine-tuning, from the notes in layer-params-146-2012-2011.cfg.

    The notes' epochs are scaled to the given number. Factors are relative to .01, the learning rate with
    which the CNN of 2012 begins. The "300 batches" after which fc8 is raised are files of 1,024 images, as in
    fix-big-imgnet.py: .24 epochs of the 1,281,167 training images.
    """

    def at(epoch: float) -> str:
        return f"{epoch * epochs / EPOCHS_OF_2012:g}"

    changes = {
        **dict.fromkeys(("conv2", "conv3", "conv4", "conv5", "conv6", "fc6", "fc7", "fc8"), 0.1),
        f"fc8@{at(0.24)}": 1,
        f"fc8@{at(9)}": 0.1,
        "conv1": 0.01,
        f"conv1@{at(5)}": 0.001,
        f"conv1@{at(7)}": 0,
    }
    return [
        *("--warmup-epochs", "0", "--schedule", "steps", "--drop-epochs", f"{at(22)},{at(42)}"),
        *("--layer-learning-rates", ",".join(f"{layer}={factor}" for layer, factor in changes.items())),
        *("--bias-schedule", "constant", "--bias-learning-rate", "2"),
        *("--colour-epochs", str(round(38 * epochs / EPOCHS_OF_2012))),
    ]
