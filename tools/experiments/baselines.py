"""Repeat the first rows of the paper's tables: linear classifiers on Fisher vectors and on sparse codes.

    alexnet-train paper baselines --data shards --seeds 3 --workers 16
    alexnet-train paper baselines --data shards --limit 100000 --only fisher

Both compute dense SIFT on the packed pictures' grey values, learn a vocabulary from some of the descriptors,
and turn each picture into one vector. Seeds affect the vocabulary and the classifier. Vectors are kept in
--out as float16; each picture and seed takes 16.5 KB with 64 Gaussians (21 GB for ImageNet's 1.28M pictures)
and 10.8 KB with 256 atoms (14 GB), and proportionally more with more of them. Pictures are encoded only once,
and a worker holds at most 256 pictures in memory. With --nets, both are compared with trained nets, image by
image.
"""

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.files import atomic_write
from pipeline.machine import cpus
from pipeline.manifest import read_manifest
from pipeline.messages import pluralize
from tools.experiments.finished import check_distinct, open_net
from tools.experiments.kept import reading
from tools.experiments.record import TOP1, TOP5, Record, Row
from tools.experiments.training import describe, packing
from tools.options import add_seeds, command_line, count
from trainer.environment import environment
from trainer.settings import SettingsError

if TYPE_CHECKING:  # these need the extra `baselines`
    from tools.experiments.features import Pictures, Store

TAKES_SETTINGS = False
_REGULARISATION = 1e-4  # weight decay; errors hardly differ from 1e-6 to 1e-3
_PACKAGES = ("scikit-learn", "scikit-image", "opencv-python-headless")


class System(NamedTuple):
    """A row of the table: its name, its published errors on ILSVRC-2010's test set, and how it differs."""

    name: str
    published: dict[str, float]
    note: str


SYSTEMS = {
    "sparse": System("sparse coding", {TOP1: 47.1, TOP5: 28.2}, "table 1; the paper averages six models"),
    "fisher": System(
        "SIFT + Fisher vectors",
        {TOP1: 45.7, TOP5: 25.7},
        "table 1; the paper averages two kinds of descriptors",
    ),
}
CNN = {TOP1: 37.5, TOP5: 17.0}  # published for the same images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="packed dataset")
    add("--limit", type=count, metavar="N", help="use at most N pictures of each split, chosen at random")
    add_seeds(parser)
    add(
        "--nets",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="compare with the nets of these runs on the same dataset, one or as many as seeds",
    )
    add("--only", choices=list(SYSTEMS), help="run only one of the two systems")
    add(
        "--gaussians",
        type=count,
        default=64,
        metavar="N",
        help="Gaussians of the Fisher vectors (default 64)",
    )
    add("--atoms", type=count, default=256, metavar="N", help="atoms of the sparse codes (default 256)")
    add("--step", type=count, default=4, metavar="PX", help="distance between descriptors (default 4)")
    add(
        "--scales",
        type=count,
        default=5,
        metavar="N",
        help="number of scales of descriptors, √2 apart (default 5)",
    )
    add(
        "--vocabulary",
        type=count,
        default=100_000,
        metavar="N",
        help="number of descriptors to learn the vocabulary from (default 100000)",
    )
    add(
        "--epochs",
        type=count,
        default=10,
        metavar="N",
        help="training epochs of the classifier (default 10)",
    )
    add(
        "--workers",
        type=count,
        default=cpus(),
        metavar="N",
        help="number of worker processes (default: one per CPU)",
    )


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Encode, train and evaluate whatever is not finished; return the record.

    Raises SettingsError, DatasetError or TrainingError.
    """
    try:
        from tools.experiments import features
        from tools.experiments.encoders import PATCH
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the baselines need packages that are not installed ({error}): "
            "pip install 'alexnet-train[baselines]'"
        ) from None
    manifest = read_manifest(options.data)
    if len(manifest.classes) < 2:
        raise SettingsError(f"{options.data} has only one class, so there is nothing to classify")
    check_distinct(options.nets or ())
    if options.nets and (options.limit or len(options.nets) not in (1, options.seeds)):
        raise SettingsError("--nets needs one run or as many as --seeds, and cannot be combined with --limit")
    if manifest.size <= PATCH:
        raise SettingsError(
            f"{options.data} has pictures of {manifest.size} px, but SIFT needs more than {PATCH} px: "
            "pack larger pictures"
        )
    folder = options.out / "baselines"
    _claim(folder, options)
    pictures = features.Pictures(options.data, options.limit, options.step, options.scales)
    words = {"fisher": options.gaussians, "sparse": options.atoms}
    systems = {kind: system for kind, system in SYSTEMS.items() if options.only in (None, kind)}
    stores = [
        features.Store(folder / f"{kind}-{seed}", kind, words[kind], seed)
        for kind in systems
        for seed in range(options.seeds)
    ]
    features.learn(pictures, stores, options.vocabulary, options.workers)
    _check_room(folder, features.bytes_to_come(pictures, stores))
    features.encode(pictures, stores, options.workers)
    errors = {
        store: _errors_once(pictures, store, len(manifest.classes), options.epochs, options.workers)
        for store in stores
    }
    from tools.experiments.predictions import wrong

    rows = [_nets(options)] if options.nets else []
    for kind, system in systems.items():
        own = Row(
            system=system.name,
            wrong=wrong([errors[store] for store in stores if store.kind == kind]),
            published=system.published,
            note=system.note,
        )
        rows.append(_compared(own, rows[0]) if options.nets else own)
    return Record(
        experiment="baselines",
        title="Baselines",
        source="section 6, published on ILSVRC-2010's test set",
        data=_budget(options),
        command=command_line(),
        dataset=packing(options.data),
        environment=environment("cpu") | _versions(),
        rows=rows,
        remarks=[
            "The published systems average classifiers on several kinds of descriptors, including colour; "
            "these use only SIFT of grey values."
        ],
    )


def _budget(options: argparse.Namespace) -> str:
    limit = f", {options.limit:,} of each split at most" if options.limit else ""
    return (
        f"{describe(options.data)}{limit}; SIFT every {options.step} px at up to {options.scales} scales, "
        f"{options.gaussians} Gaussians, {options.atoms} atoms, {options.vocabulary:,} descriptors to learn "
        f"from, {options.epochs} epochs, {pluralize(options.seeds, 'seed', 'seeds')}"
    )


def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


def _claim(folder: Path, options: argparse.Namespace) -> None:
    """Record what the folder's features depend on. Raises SettingsError if it holds other features."""
    own = {"dataset": read_manifest(options.data).fingerprint, **_versions()}
    own |= {
        name: getattr(options, name)
        for name in ("limit", "gaussians", "atoms", "step", "scales", "vocabulary")
    }
    path = folder / "settings.json"
    if path.exists():
        with reading(path):
            held = json.loads(path.read_text())
        differing = [f"{key} ({held.get(key)}, not {own[key]})" for key in own if held.get(key) != own[key]]
        if differing:
            raise SettingsError(
                f"{folder} already holds features with another {', '.join(differing)}: choose another --out, "
                "or use those settings to continue"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(own, indent=1).encode() + b"\n")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SettingsError(
            f"the features need {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "choose another --out, a --limit, or fewer --gaussians, --atoms or --seeds"
        )


def _nets(options: argparse.Namespace) -> Row:
    """Return the row of the nets with which the baselines are compared, on ten crops."""
    from tools.experiments.predictions import errors_of, wrong

    found, six = [], False
    for folder in options.nets:
        opened = open_net(folder, "val", data=options.data)
        found.append(errors_of(opened, "val", 10, options.out))
        six = opened.trained.settings.conv6
    name = "CNN*" if six else "CNN"
    return Row(system=name, wrong=wrong(found), published={} if six else CNN, note="ten crops")


def _compared(row: Row, nets: Row) -> Row:
    """Return a baseline's row with the published differences from the nets."""
    return row.model_copy(
        update={
            "than": nets.system,
            "published": {
                name: round(row.published[name] - value, 1) for name, value in nets.published.items()
            },
            "signs": {TOP1: 1, TOP5: 1},
            "claims": {TOP1: f"With {row.system}, the error is higher than with a {nets.system} (6)"},
        }
    )


def _errors_once(pictures: "Pictures", store: "Store", classes: int, epochs: int, workers: int) -> np.ndarray:
    """Return which images of val are top-1 and top-5 errors, bool [2,images] in the dataset's order.

    They are kept in the store's folder.
    """
    path = store.folder / f"errors-{epochs}.npz"
    if not path.exists():
        files = {
            split: [store.chunk(split, number) for number in range(len(pictures.chunks(split)))]
            for split in ("train", "val")
        }
        labels = {split: pictures.labels(split) for split in files}
        found = linear_errors(files, labels, classes, epochs, store.seed, workers)
        found = found[:, np.argsort(np.concatenate(pictures.chunks("val")))]
        with atomic_write(path) as file:
            np.savez(file, wrong=found)
        top1, top5 = found.mean(1)
        print(f"{store.folder.name}: top-1 error {top1:.1%}, top-5 error {top5:.1%}", flush=True)
    with reading(path), np.load(path) as arrays:
        return arrays["wrong"]


def linear_errors(
    files: dict[str, list[Path]],
    labels: dict[str, list[np.ndarray]],
    classes: int,
    epochs: int,
    seed: int,
    workers: int,
) -> np.ndarray:
    """Train a linear SVM per class on the files of `train`, one in memory at a time.

    Returns which images of `val` are top-1 and top-5 errors: bool [2,images], in the order of its chunks.
    files, labels: for each split, those of its chunks. Training is averaged stochastic gradient descent whose
    average starts after the first epoch.
    """
    import torch
    from sklearn.linear_model import SGDClassifier

    from trainer.evaluate import find_errors

    images = sum(map(len, labels["train"]))
    svm = SGDClassifier(alpha=_REGULARISATION, average=images, random_state=seed, n_jobs=workers)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for chunk in rng.permutation(len(files["train"])):
            features = _features(files["train"][chunk])
            svm.partial_fit(features, labels["train"][chunk], classes=np.arange(classes))
    wrong = []
    for file, own in zip(files["val"], labels["val"], strict=True):
        scores = svm.decision_function(_features(file))
        if classes == 2:  # [n]: scores of the second class
            scores = np.stack((-scores, scores), 1)
        wrong.append(find_errors(torch.from_numpy(scores), torch.from_numpy(own)).numpy())
    return np.concatenate(wrong, axis=1)


def _features(file: Path) -> np.ndarray:
    with reading(file):
        return np.load(file).astype(np.float32)
