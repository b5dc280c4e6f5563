"""Opening the trained net of a finished run for an experiment, from its options."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.locations import Location
from pipeline.manifest import DatasetError, read_manifest
from tools.experiments.training import describe, packing, provenance
from tools.options import add_device, command_line
from trainer.environment import environment
from trainer.run import Run
from trainer.setting_groups import ALEXNET
from trainer.settings import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from model.alexnet import AlexNet
    from trainer.evaluate import TrainedNet
    from trainer.processes.distributed import World


class Finished(NamedTuple):
    """A trained net in evaluation mode.

    world: this process and its device. precision: that of autocast.
    """

    trained: "TrainedNet"
    world: "World"
    precision: str
    folder: Path

    @property
    def net(self) -> "AlexNet":
        """The net itself."""
        return cast("AlexNet", self.trained.model)  # open_net refuses others

    def pixels(self, split: str, number: int) -> "Tensor":
        """Return one image as the net takes it: its centre crop [1,3,crop,crop]. Raises DatasetError."""
        total = self.trained.dataset.manifest.split(split).samples
        # With as many processes as images, each process has one image.
        [(pixels, _)] = self.trained.batches(split, 1, replace(self.world, rank=number, size=total))
        return pixels

    def about(self, *others: "Finished") -> dict[str, Any]:
        """Return a record's fields on data, nets and machine."""
        nets = []
        for net in (self, *others):
            settings, step = net.trained.settings, net.trained.step
            nets.append(f"{net.folder.name} ({settings.preset}, crop {settings.crop} px, {step:,} steps)")
        return {
            "data": f"{describe(self.trained.settings.data)}; nets: {', '.join(nets)}",
            "command": command_line(),
            "environment": environment(self.world.device_name),
            "dataset": packing(self.trained.settings.data),
            **provenance([Run(net.folder) for net in (self, *others)]),
        }


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options of an experiment on finished runs. several: accept more than one run."""
    add = parser.add_argument
    if several:
        add("runs", nargs="+", type=Path, metavar="RUN", help="run folders of trained nets")
    else:
        add("run", type=Path, metavar="RUN", help="run folder of the trained net")
    add("--data", type=Path, metavar="DIR", help="use this dataset instead of the run's own")
    add(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="checkpoint of each run (default newest)",
    )
    add_device(parser)


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add --split, for experiments that evaluate nets."""
    parser.add_argument("--split", default="val", help="split of the dataset to evaluate on (default val)")


def open_run(options: argparse.Namespace, *splits: str) -> Finished:
    """Open the net of options.run. splits: splits that the dataset must have. Raises as `open_net` does."""
    return open_net(
        options.run, *splits, data=options.data, checkpoint=options.checkpoint, device=options.device
    )


def open_net(
    folder: Path,
    *splits: str,
    data: Location | None = None,
    checkpoint: str = "newest",
    device: str = "auto",
) -> Finished:
    """Open the net of a run.

    splits: splits that the dataset must have. data: a dataset to use instead of the run's own. checkpoint:
    `newest` or `best`. Raises SettingsError, DatasetError or RunError, as `load_trained` does, and before
    importing torch where possible.
    """
    run = Run(folder)
    settings = run.settings()
    if settings.net != ALEXNET:
        raise SettingsError(f"{folder} has the net {settings.net}: the paper's experiments need AlexNet")
    if data:
        settings = settings.model_copy(update={"data": data})
    there = read_manifest(settings.data).splits
    for split in splits:
        if split not in there:
            raise DatasetError(
                f"{settings.data} has no split '{split}', only {', '.join(there)}: "
                "choose a dataset that has it with --data"
            )

    from trainer.evaluate import load_trained
    from trainer.precision import resolve_precision
    from trainer.processes import distributed

    world = distributed.join(device)
    trained = load_trained(settings, run, world.device, checkpoint == "best")
    print(*trained.notes, sep="\n", end="\n" * bool(trained.notes), file=sys.stderr)
    trained.model.eval()
    precision = resolve_precision(settings.precision, world.device)
    return Finished(trained, world, precision, folder.resolve())


def open_runs(options: argparse.Namespace, *splits: str) -> list[Finished]:
    """Open the nets of options.runs, all on the dataset of the first.

    splits: splits that the dataset must have. Raises SettingsError if a run is given twice, and what
    `open_run` raises.
    """
    check_distinct(options.runs)
    opened: list[Finished] = []
    for run in options.runs:
        data = opened[0].trained.settings.data if opened else options.data
        opened.append(open_net(run, *splits, data=data, checkpoint=options.checkpoint, device=options.device))
    return opened


def check_distinct(runs: Sequence[Path]) -> None:
    """Raise SettingsError if a run is given twice, which would count as two seeds."""
    for run, times in Counter(run.resolve() for run in runs).items():
        if times > 1:
            raise SettingsError(f"{run} is given {times} times: each run counts as a seed of its own")
