"""Repeat Fig. 4: how a net classifies validation images, and which training images it finds similar.

    alexnet-train paper figure4 runs/a

Shows eight validation images with their five most probable classes, and five others with the six training
images whose 4096 activations of the last hidden layer are nearest in L2. The activations of the training
images are computed once and kept in --out. Images are given by their index in the split, from 0, or chosen at
random with --seed. With --classes, all images shown are of these classes, for example because the licences of
others do not allow publication; the net still chooses among all classes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.experiments import finished
from tools.experiments.finished import Finished
from tools.experiments.record import Figure, Record
from tools.options import natural
from trainer.settings import SettingsError

if TYPE_CHECKING:
    from pipeline.loader import Dataset
    from tools.experiments.figure4_drawing import Classified, Picture, Retrieved

TAKES_SETTINGS = False
IMAGES, TOP = 8, 5
QUERIES, NEIGHBOURS = 5, 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    finished.add_arguments(parser)
    add = parser.add_argument
    add(
        "--images",
        type=natural,
        nargs="+",
        metavar="N",
        help=f"indices of images to classify (default: {IMAGES} random ones)",
    )
    add(
        "--queries",
        type=natural,
        nargs="+",
        metavar="N",
        help="indices of validation images whose nearest training images are shown "
        f"(default: {QUERIES} others)",
    )
    add(
        "--classes", nargs="+", metavar="CLASS", help="show only images of these classes, given by name or ID"
    )
    add(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="seed for choosing images and queries at random (default 0)",
    )


def run(options: argparse.Namespace, _settings: list[str]) -> Record:
    """Draw figure4.png.

    Raises SettingsError for an index out of range, and what `open_run` and `cached_features` raise.
    """
    opened = finished.open_run(options, "train", "val")
    shown, neighbours = (_of_classes(opened, split, options.classes) for split in ("val", "train"))
    drawn = np.random.default_rng(options.seed).permutation(shown).tolist()
    total = opened.trained.dataset.manifest.split("val").samples
    images = _checked("--images", options.images or drawn[:IMAGES], shown, total)
    queries = _checked("--queries", options.queries or drawn[-QUERIES:], shown, total)

    from tools.experiments.figure4_drawing import CAPTION, draw

    classified = [classify(opened, number) for number in images]
    retrieved = retrieve(opened, queries, neighbours, options.out)
    draw(options.out / "figure4.png", classified, retrieved)
    return Record(
        experiment="figure4",
        title="Fig. 4: five most probable classes, and nearest training images",
        source="Fig. 4 and section 6.1",
        rows=[],
        remarks=[counts(classified, retrieved)],
        figures=[Figure(file="figure4.png", caption=CAPTION)],
        **opened.about(),
    )


def _of_classes(opened: Finished, split: str, classes: list[str] | None) -> np.ndarray:
    """Return the indices of a split's images of some classes, by default of all, in ascending order.

    Raises SettingsError for an unknown class, or if there is no image of the classes.
    """
    from tools.experiments.figure4_drawing import short

    dataset = opened.trained.dataset
    labels = dataset.reader(split).rows["label"]
    if classes is None:
        return np.arange(len(labels))
    names = [(known.id, known.name, short(known.name)) for known in dataset.manifest.classes]
    chosen = []
    for name in classes:
        found = [label for label, known in enumerate(names) if name in known]
        if not found:
            raise SettingsError(f"--classes {name}: the dataset has no such class")
        chosen += found
    numbers = np.flatnonzero(np.isin(labels, chosen))
    if not len(numbers):
        raise SettingsError(f"--classes: the split {split} has no image of these classes")
    return numbers


def _checked(option: str, numbers: list[int], shown: np.ndarray, total: int) -> list[int]:
    for number in numbers:
        if number >= total:
            raise SettingsError(f"{option} {number}: the indices of validation images are 0 to {total - 1}")
        if number not in shown:
            raise SettingsError(f"{option} {number}: this image belongs to none of the classes in --classes")
    return numbers


def classify(opened: Finished, number: int) -> "Classified":
    """Classify a validation image; its most probable classes come best first."""
    import torch

    from tools.experiments.figure4_drawing import Classified
    from trainer.evaluate import log_probabilities
    from trainer.precision import autocast, prepare

    with torch.inference_mode(), autocast(opened.precision, opened.world.device):
        pixels = prepare(opened.pixels("val", number), opened.precision)
        scores = log_probabilities(opened.trained.model, pixels)[0]
    best = scores.topk(min(TOP, len(scores)))
    classes = opened.trained.dataset.manifest.classes
    top = [
        (label, classes[label].name, probability)
        for label, probability in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]
    return Classified(picture(opened.trained.dataset, "val", number), top)


def retrieve(opened: Finished, queries: list[int], among: np.ndarray, out: Path) -> "list[Retrieved]":
    """Find the training images nearest to each of some validation images.

    among: the indices of the training images that may be found, in ascending order.
    """
    from tools.experiments.fc7 import cached_features, features, nearest, take
    from tools.experiments.figure4_drawing import Retrieved

    points = np.concatenate([features(opened, opened.pixels("val", query)) for query in queries])
    index = cached_features(opened, "train", out)
    if len(among) < opened.trained.dataset.manifest.split("train").samples:
        index = [take(index, among)]
    distances, positions = nearest(points, index, NEIGHBOURS, opened.world.device)
    numbers = among[positions]
    dataset = opened.trained.dataset
    return [
        Retrieved(
            picture(dataset, "val", query),
            [(picture(dataset, "train", n), d) for n, d in zip(found, far, strict=True)],
        )
        for query, found, far in zip(queries, numbers.tolist(), distances.tolist(), strict=True)
    ]


def picture(dataset: "Dataset", split: str, number: int) -> "Picture":
    from tools.experiments.figure4_drawing import Picture, thumbnail

    reader = dataset.reader(split)
    label = int(reader.rows["label"][number])
    return Picture(number, label, dataset.manifest.classes[label].name, thumbnail(reader, number))


def counts(classified: "list[Classified]", retrieved: "list[Retrieved]") -> str:
    """Say how many of the images shown are classified correctly, and how many neighbours share the class."""
    first = sum(shown.picture.label == shown.top[0][0] for shown in classified)
    among = sum(shown.picture.label in (label for label, *_ in shown.top) for shown in classified)
    alike = [near.label == shown.query.label for shown in retrieved for near, _ in shown.nearest]
    return (
        f"The net's most probable class is correct for {first} of the {len(classified)} images, and the "
        f"correct class is among the {len(classified[0].top)} most probable for {among}. Of the {len(alike)} "
        f"nearest training images, {sum(alike)} have the class of their query."
    )
