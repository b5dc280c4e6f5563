"""What an evaluation finds besides its scores: errors by class, confused classes and confident mistakes.

Three tables hold it; docs/trained-nets.md describes their columns. Memory and files grow with the number of
pairs of classes that occur, and not with the number of images.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import EvaluationLoader
from pipeline.documents import ContentError
from pipeline.files import atomic_write
from pipeline.manifest import Class, DatasetError
from pipeline.reader import ShardReader
from pipeline.retry import read_with_retries, with_retries
from trainer.processes.distributed import World

MISTAKES = 48  # number of mistakes that are kept
BY_CLASS, CONFUSION, WORST = "errors_by_class.csv", "confusion.csv", "mistakes.csv"


class Mistake(NamedTuple):
    """An image whose predicted class is wrong. sample: its number in the split."""

    probability: float
    label: int
    predicted: int
    sample: int


class ClassErrors(NamedTuple):
    """The errors of a class. predicted: number of images of any class that were predicted as this one."""

    label: int
    images: int
    errors: int
    predicted: int

    @property
    def error(self) -> float:
        """The top-1 error, from 0 to 1. There must be images."""
        return self.errors / self.images


class Tally:
    """Counts the images and the top-1 errors of each class on the device, without making the host wait."""

    def __init__(self, classes: int, device: torch.device):
        self._counts = torch.zeros(2, classes, dtype=torch.int64, device=device)

    def add(self, labels: Tensor, wrong: Tensor) -> None:
        """Add a batch. labels: int64 [n]. wrong: bool [n], whether the prediction is wrong."""
        self._counts.index_add_(1, labels, torch.stack([torch.ones_like(labels), wrong.long()]))

    def combine(self, world: World) -> tuple[list[int], list[int]]:
        """Return the images and the errors by label, over all processes. All processes must call this."""
        images, errors = world.all_reduce(self._counts).tolist()
        return images, errors


class Recorder:
    """Records the details of an evaluation in this process. loader: it yields the batches that are added."""

    def __init__(self, loader: EvaluationLoader):
        self.loader = loader
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.mistakes: list[Mistake] = []

    def add(self, log_probabilities: Tensor, predicted: Tensor, labels: Tensor) -> None:
        """Add the loader's last batch. log_probabilities: [n,classes]. predicted, labels: [n]."""
        probabilities = log_probabilities.gather(1, predicted[:, None])[:, 0].exp().tolist()
        columns = (probabilities, labels.tolist(), predicted.tolist(), self.loader.samples.tolist())
        found = [Mistake(*row) for row in zip(*columns, strict=True)]
        self.pairs.update((image.label, image.predicted) for image in found)
        wrong = (image for image in found if image.label != image.predicted)
        self.mistakes = _most_confident([*self.mistakes, *wrong])

    def combine(self, world: World) -> "Details":
        """Return the details of all processes together. All processes must call this."""
        parts = world.gather((self.pairs, self.mistakes))
        pairs: Counter[tuple[int, int]] = Counter()
        for counted, _ in parts:
            pairs.update(counted)
        return Details(pairs, _most_confident(image for _, mistakes in parts for image in mistakes))


def _most_confident(mistakes: Iterable[Mistake]) -> list[Mistake]:
    """Return the MISTAKES most confident ones, and of equally confident ones the first of the split."""
    return nsmallest(MISTAKES, mistakes, key=lambda image: (-image.probability, image.sample))


class Details(NamedTuple):
    """The details of an evaluation.

    pairs: number of images by label and predicted label. mistakes: the MISTAKES most confident ones, most
    confident first.
    """

    pairs: Mapping[tuple[int, int], int]
    mistakes: Sequence[Mistake]

    def by_class(self, classes: int) -> list[ClassErrors]:
        """Return the errors of each class, in the order of the labels. classes: number of classes."""
        images, errors, predicted = (np.zeros(classes, np.int64) for _ in range(3))
        for (label, other), count in self.pairs.items():
            images[label] += count
            errors[label] += count * (label != other)
            predicted[other] += count
        counts = zip(images.tolist(), errors.tolist(), predicted.tolist(), strict=True)
        return [ClassErrors(label, *each) for label, each in enumerate(counts)]

    def worst_pairs(self) -> list[tuple[int, int, int]]:
        """Return label, predicted label and number of images of each wrong pair, the largest number first."""
        wrong = ((label, other, count) for (label, other), count in self.pairs.items() if label != other)
        return sorted(wrong, key=lambda pair: (-pair[2], *pair[:2]))

    def write(self, folder: Path, classes: tuple[Class, ...], reader: ShardReader) -> None:
        """Write the tables into a folder. reader: that of the split. Raises OSError."""
        by_class = (
            (
                *(each.label, classes[each.label].id, classes[each.label].name, each.images, each.errors),
                *(f"{each.error:.6f}" if each.images else "", each.predicted),
            )
            for each in self.by_class(len(classes))
        )
        confusion = (
            (label, classes[label].id, predicted, classes[predicted].id, images)
            for (label, predicted), images in sorted(self.pairs.items())
        )
        _write(folder / BY_CLASS, "label,id,name,images,errors,error,predicted", by_class)
        _write(folder / CONFUSION, "label,id,predicted_label,predicted_id,images", confusion)
        mistakes = (self._located(image, classes, reader) for image in self.mistakes)
        columns = "sample,shard,offset,key,label,id,predicted_label,predicted_id,probability"
        _write(folder / WORST, columns, mistakes)

    def _located(self, image: Mistake, classes: tuple[Class, ...], reader: ShardReader) -> tuple:
        row = reader.rows[image.sample]
        try:
            key = reader.key(image.sample)
        except DatasetError:
            key = ""
        place = image.sample, reader.split.shards[row["shard"]].file, row["offset"], key
        of_classes = image.label, classes[image.label].id, image.predicted, classes[image.predicted].id
        return *place, *of_classes, f"{image.probability:.6f}"


def read_details(folder: Path, classes: int) -> Details | None:
    """Read the tables that `Details.write` has written, or return None if the folder has none.

    classes: number of classes. Raises ContentError if a table is damaged, and OSError if one is missing or
    cannot be read.
    """
    if not (folder / CONFUSION).exists():
        return None
    confusion = _read(folder / CONFUSION, classes, ("images",))
    mistakes = _read(folder / WORST, classes, ("probability", "sample"))
    return Details(
        {(label, predicted): int(images) for label, predicted, images in confusion},
        [
            Mistake(probability, label, predicted, int(sample))
            for label, predicted, probability, sample in mistakes
        ],
    )


def _write(path: Path, columns: str, rows: Iterable[Iterable[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns.split(","), *rows])
    content = text.getvalue().encode(errors="backslashreplace")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(content)

    with_retries(write)


def _read(path: Path, classes: int, columns: tuple[str, ...]) -> Iterator[tuple]:
    """Yield label, predicted label and these columns, which are numbers, of each row."""
    text = io.StringIO(read_with_retries(path).decode(errors="replace"), newline="")
    try:
        for row in csv.DictReader(text, strict=True):
            labels = int(row["label"]), int(row["predicted_label"])
            if not 0 <= min(labels) <= max(labels) < classes:
                raise ValueError(labels)
            yield (*labels, *(float(row[column]) for column in columns))
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ContentError(f"{path} is damaged: restore it from a copy, or delete it") from None
