"""What trained nets say of each image of a split, computed once and kept."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.files import whole_file
from tools.experiments.record import TOP1, TOP5, Measures
from tools.experiments.training import describe
from trainer import distributed
from trainer.evaluate import Trained, count_errors, load_trained, log_probabilities
from trainer.run import Run, environment
from trainer.step import autocast, prepare, resolve_precision


class Member(NamedTuple):
    """A trained net under the name of its run."""

    name: str
    trained: Trained


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trained nets, and which images."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, each with its newest checkpoint")
    add("--best", action="store_true", help="the checkpoint with the least top-1 error instead")
    add("--data", type=Path, metavar="DIR", help="another dataset of the same classes than the first run's")
    add("--split", default="val", help="default val")


def load_members(options: argparse.Namespace) -> list[Member]:
    """The nets of runs, all on the dataset of the first.

    Raises SettingsError where another was trained on other classes, and what `load_trained` does.
    """
    members: list[Member] = []
    device = distributed.join("auto").device
    for folder in options.runs:
        run = Run(folder)
        settings = run.settings()
        data = options.data or (members[0].trained.settings.data if members else settings.data)
        moved = settings.model_copy(update={"data": data})
        members.append(Member(folder.name, load_trained(moved, run, device, options.best)))
    return members


def about(options: argparse.Namespace, members: Sequence[Member]) -> dict[str, Any]:
    """What a record says of the images, the nets and the machine."""
    settings, manifest = members[0].trained.settings, members[0].trained.dataset.manifest
    images = f"the {manifest.split(options.split).samples:,} images of '{options.split}'"
    return {
        "data": f"{images} in {describe(settings.data)}; the first net trained for {settings.epochs} epochs "
        f"at a crop of {settings.crop} px",
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(distributed.join("auto").device_name),
    }


def probabilities(trained: Trained, split: str, crops: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """[images,classes] float32, averaged over the crops (section 4.1), and the labels [images].

    They are kept in `folder`, and taken from there where weights, images and crops are the same.
    """
    world = distributed.join("auto")
    precision = resolve_precision(trained.settings.precision, world.device)
    kept = folder / f"{_key(trained, split, crops, precision)}.npz"
    if kept.exists():
        with np.load(kept) as arrays:
            return arrays["probabilities"], arrays["labels"]
    found, labels = [], []
    trained.model.eval()
    with torch.inference_mode():
        for pixels, truth in trained.batches(split, crops, world):
            with autocast(precision, world.device):
                found.append(log_probabilities(trained.model, prepare(pixels, precision)).exp().cpu().numpy())
            labels.append(truth.cpu().numpy())
    arrays = {"probabilities": np.concatenate(found), "labels": np.concatenate(labels)}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(kept) as file:
        np.savez(file, **arrays)
    return arrays["probabilities"], arrays["labels"]


def _key(trained: Trained, *others: object) -> str:
    digest = sha256(json.dumps([trained.dataset.manifest.fingerprint, *others]).encode())
    for value in trained.model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def errors(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 error of [images,classes], in percent."""
    wrong = count_errors(torch.from_numpy(scores), torch.from_numpy(labels)).tolist()
    return {measure: 100 * count / len(labels) for measure, count in zip((TOP1, TOP5), wrong, strict=True)}


def transposed(rows: Sequence[dict[str, float]]) -> Measures:
    """A list of values for each measure."""
    return {measure: [row[measure] for row in rows] for measure in rows[0]}
