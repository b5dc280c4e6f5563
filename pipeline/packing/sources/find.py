"""Find the images to pack: the files of each split, their labels, and the names of the classes."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.packing.sources.folders import find_splits
from pipeline.packing.sources.labels import read_class_names
from pipeline.packing.sources.listing import SourceError, SplitFiles, open_folder
from pipeline.packing.sources.tables import is_table, read_table
from pipeline.packing.storage import absolute


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image to pack.

    path: its name for sorting and for the report, which is the same in most forms of input:
    `train/<class>/<file>`. file: the path or URL to read. offset, size: its part of the file in bytes, if the
    image is a member of a tar.
    """

    path: str
    label: int
    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Sources:
    """The images to pack.

    classes: class ids in the order of their labels. splits: the images of each split, sorted by label and
    path. strays: files that belong to no class and cannot be packed. names: the readable names of classes, by
    id. table: the path or URL of the table that lists the images, or None. Files that a table lists need not
    exist. sealed: as in SplitFiles.
    """

    classes: list[str]
    splits: dict[str, list[SourceImage]]
    strays: list[str]
    names: dict[str, str] = field(default_factory=dict)
    table: str | None = None
    sealed: frozenset[str] = frozenset()


def find_sources(
    input: str | Path, val_fraction: float | None, seed: int, class_names: Path | None = None
) -> Sources:
    """Find the images of a folder or a table, local or behind a URL; folders.py lists the supported forms.

    val_fraction: the fraction of each class to hold out for validation, or None if the input has a validation
    split. seed: of the choice of those images. class_names: the file of --class-names. Raises SourceError if
    there is nothing to pack, or if it is unclear which images are for validation.
    """
    names, table = read_class_names(class_names), None
    try:
        if is_table(str(input)) and not Path(input).is_dir():
            table = absolute(str(input))
            files, read_names = read_table(table, val_fraction)
        else:
            files, read_names = find_splits(open_folder(str(input)), val_fraction)
        sources = _assign_labels(files, val_fraction, seed, names if class_names else read_names())
    except OSError as error:
        raise SourceError(f"--input {input} cannot be read: {error}") from error
    if class_names:
        _refuse_lookalikes([*sources.classes, *names], f"--class-names {class_names} and --input {input}")
    return replace(sources, table=table)


def _assign_labels(
    found: dict[str, SplitFiles], val_fraction: float | None, seed: int, names: dict[str, str]
) -> Sources:
    """Number the classes, and check that each split has images, and that train has images of each class."""
    train = found["train"]
    classes = _sort_classes(train.classes)
    if not classes:
        raise SourceError(
            f"{train.location} has no class folders: images are expected as {train.location}/<class>/<image>"
        )
    _refuse_lookalikes(classes, train.location)
    for name in classes:
        if not name.isprintable():  # such as a line break, or bytes that are not UTF-8
            raise SourceError(
                f"the class {name!r} in {train.location} has unprintable characters in its name: rename it"
            )
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[SourceImage]] = {}
    for split, files in found.items():
        images = []
        for path, class_id, file, offset, size in files.images:
            if class_id not in labels:
                _refuse_lookalikes([*classes, class_id], f"{files.location} and {train.location}")
                raise SourceError(f"the class {class_id} is in {files.location} but not in {train.location}")
            images.append(SourceImage(path, labels[class_id], file, offset, size))
        splits[split] = sorted(images, key=lambda source: (source.label, source.path))
    if val_fraction is not None:
        splits = _hold_out(splits["train"], val_fraction, seed)
    for split, sources in splits.items():
        if not sources:
            raise SourceError(f"{found.get(split, train).location} has no files for the split '{split}'")
    untrained = set(range(len(classes))) - {source.label for source in splits["train"]}
    if untrained:
        listed = ", ".join(classes[label] for label in sorted(untrained))
        raise SourceError(
            f"{train.location} has no files for the classes {listed}: add images or remove the classes"
        )
    strays = [stray for files in found.values() for stray in files.strays]
    sealed = frozenset().union(*(files.sealed for files in found.values()))
    return Sources(classes, splits, strays, names, sealed=sealed)


def _refuse_lookalikes(names: Iterable[str], location: str) -> None:
    """Raise SourceError for names that look the same but differ, such as é and e with a combining accent."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise SourceError(
                f"{location}: the classes {other!a} and {name!a} look alike: both are {name}, in two Unicode "
                "normal forms (NFC, and NFD as macOS writes it): rename one, or merge them"
            )


def _sort_classes(classes: Iterable[str]) -> list[str]:
    """Sort class ids: numerically if all are decimal numbers, so that 2 precedes 10, else alphabetically."""
    if all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _hold_out(sources: list[SourceImage], fraction: float, seed: int) -> dict[str, list[SourceImage]]:
    """Hold out the same fraction of each class for validation, chosen by the seed."""
    rng = np.random.default_rng((seed, 1))
    labels = np.array([source.label for source in sources])
    held = np.zeros(len(sources), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[rng.permutation(members)[: round(len(members) * fraction)]] = True
    return {
        "train": [source for source, out in zip(sources, held, strict=True) if not out],
        "val": [source for source, out in zip(sources, held, strict=True) if out],
    }
