"""Train cuda-convnet's published net for CIFAR-10, layers-18pct, by its published settings.

    alexnet-train paper cifar10 --data shards --seeds 2 --jobs 2

The author's code of 2011 was published with this net and its error of 18 %. It has the four layers of Fig. 1,
with ReLU and response normalisation, and learns whole images of 32 px for 140 epochs. Images are kept in
memory, 3 KB each. The state is saved after each epoch: finished runs are not repeated, and interrupted ones
resume.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.manifest import read_manifest
from pipeline.messages import pluralize
from tools.experiments.plotting import plot_file
from tools.experiments.record import Figure, Record, Row, TrainedRun, Wrong
from tools.experiments.training import describe, packing
from tools.options import add_device, add_jobs, add_seeds, command_line, count
from trainer.environment import environment

if TYPE_CHECKING:
    from tools.experiments.small_training import Outcome

TAKES_SETTINGS = False
NET = "layers-18pct"
TEST, TRAIN, GAP = "test error (%)", "training error (%)", "test minus training error (%)"
EPOCHS = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, EPOCHS)
    add_seeds(parser, 2)


def add_common_arguments(parser: argparse.ArgumentParser, epochs: int) -> None:
    """Add the options of the experiments that train nets of cuda-convnet."""
    add = parser.add_argument
    add("--data", type=Path, default=Path("shards"), metavar="DIR", help="packed dataset (default shards)")
    text = f"number of epochs, to which the schedule of learning rates is stretched (default {epochs})"
    add("--epochs", type=count, default=epochs, metavar="N", help=text)
    add_device(parser)
    add_jobs(parser)


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Train the runs that are not finished and draw cifar10.png. Raises DatasetError or TrainingError."""
    outcomes, about = trained(options, "cifar10", [NET])
    return Record(
        experiment="cifar10",
        title="CIFAR-10: cuda-convnet's layers-18pct",
        source="cuda-convnet, to which section 3.3 refers: layers-18pct.cfg and layer-params-18pct.cfg",
        data=f"{describe(options.data)}; whole images of 32 px minus the mean image, batch 128, learning "
        f"rates .001 and, for biases, .002, divided by 10 after 6/7 and 13/14 of {options.epochs} epochs, "
        f"{pluralize(options.seeds, 'seed', 'seeds')}",
        rows=[
            Row(
                system=NET,
                **measures(outcomes[NET]),
                published={TEST: 18},
                claims={TEST: "The author's example net for CIFAR-10 (cuda-convnet)"},
            )
        ],
        figures=[curves(options.out / "cifar10.png", outcomes, {NET: 18})],
        **about,
    )


def trained(
    options: argparse.Namespace, experiment: str, names: list[str]
) -> tuple[dict[str, list["Outcome"]], dict[str, Any]]:
    """Train the nets of these recipes with each seed; return their outcomes by recipe.

    Also returns a record's fields on what reproduces them.

    Raises DatasetError, SettingsError or TrainingError.
    """
    from tools.experiments.jobs import run_all
    from tools.experiments.small_training import load, train
    from trainer.processes import distributed

    manifest = read_manifest(options.data)
    world = distributed.join(options.device)
    folder = options.out / experiment / f"{manifest.fingerprint}-{options.epochs}"
    folder.mkdir(parents=True, exist_ok=True)
    data = load(options.data, manifest, world.device)
    tasks = [(name, seed, options.epochs) for seed in range(options.seeds) for name in names]
    found = run_all(train, (data, folder), tasks, options.jobs)
    outcomes = {name: found[index :: len(names)] for index, name in enumerate(names)}
    about = {
        "command": command_line(),
        "environment": environment(world.device_name),
        "dataset": packing(options.data),
        "settings": {"epochs": options.epochs, "precision": "fp32"},
        "runs": [
            TrainedRun(name=name, seed=seed, settings={}, minutes=outcome.minutes)
            for name, of_seeds in outcomes.items()
            for seed, outcome in enumerate(of_seeds)
        ],
    }
    return outcomes, about


def measures(outcomes: list["Outcome"]) -> dict[str, Any]:
    """Return a row's fields with the errors of each seed."""
    return {
        "wrong": {TEST: Wrong.of([outcome.wrong.numpy() for outcome in outcomes])},
        "measured": {TRAIN: [100 * outcome.train_error for outcome in outcomes]},
        "gaps": {GAP: (TEST, TRAIN)},
    }


def curves(path: Path, outcomes: dict[str, list["Outcome"]], published: dict[str, float]) -> Figure:
    """Draw the errors of nets over epochs; return the figure. published: the test error of each net, in %."""
    with plot_file(path, height=4.4) as axes:
        highest = 0.0
        for colour, (name, found) in zip(("C0", "C3"), outcomes.items(), strict=False):
            for seed, outcome in enumerate(found):
                train, test = 100 * np.transpose(outcome.curve)
                epochs = np.arange(1, len(train) + 1)
                labels = (f"{name}: training", f"{name}: test") if seed == 0 else (None, None)
                # The error on training images is an average over its epoch.
                axes.plot(epochs - 0.5, train, ":", color=colour, linewidth=1.2, label=labels[0])
                axes.plot(epochs, test, color=colour, linewidth=1.2, label=labels[1])
                highest = max(highest, test[len(test) // 10])
            label = f"{name}: published, {published[name]:g} %"
            axes.axhline(published[name], color=colour, linewidth=0.8, linestyle="--", label=label)
        axes.set(xlabel="epochs", ylabel="error (%)", xlim=(0, None), ylim=(0, 1.2 * highest))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right", fontsize="small")
    caption = (
        "Errors over epochs, with one line per seed: of training images while the net is trained, and of "
        "test images, in one view, after each epoch."
    )
    return Figure(file=path.name, caption=caption)
