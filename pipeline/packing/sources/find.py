"""What there is to pack: the image files of each split, their labels and the classes' names."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.packing.sources.folders import find_parts
from pipeline.packing.sources.labels import read_class_names
from pipeline.packing.sources.listing import SourceError, SplitFiles, open_folder
from pipeline.packing.sources.tables import is_table, read_table
from pipeline.packing.storage import absolute


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image to pack.

    path: its name for sorting and for the report, mostly `train/<class>/<file>` whatever form the
    input has. file: what storage.read opens; with offset and size where it is a member of a tar.
    """

    path: str
    label: int
    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Sources:
    """classes: ids in the order of their labels. splits: files, sorted by label and path. strays:
    files outside any class folder, which cannot be packed. names: of classes, by id. table: that which
    names the files, if one does, so that nobody has seen them yet."""

    classes: list[str]
    splits: dict[str, list[SourceImage]]
    strays: list[str]
    names: dict[str, str] = field(default_factory=dict)
    table: str | None = None


def find_sources(
    input: str | Path, val_fraction: float | None, seed: int, class_names: Path | None = None
) -> Sources:
    """Find the images of a folder or a table, here or behind a URL; folders.py has the forms.

    Raises SourceError where nothing can be packed, or where it is unclear what is to be kept for
    validation, and OSError.
    """
    names, table = read_class_names(class_names), None
    try:
        if is_table(str(input)) and not Path(input).is_dir():
            parts, table = read_table(str(input), val_fraction), absolute(str(input))
        else:
            parts, annotations = find_parts(open_folder(str(input)), val_fraction)
            names = names if class_names else annotations.names()
        found = _number(parts, val_fraction, seed, names)
    except OSError as error:
        raise SourceError(f"--input {input} cannot be read: {error}") from error
    if class_names:
        _check_alike([*found.classes, *names], f"--class-names {class_names} and --input {input}")
    return replace(found, table=table)


def _number(
    parts: dict[str, SplitFiles], val_fraction: float | None, seed: int, names: dict[str, str]
) -> Sources:
    """Give the classes their labels, and check that there is enough to train and validate on."""
    train = parts["train"]
    classes = _in_order(train.classes)
    if not classes:
        raise SourceError(
            f"{train.place} has no class folders: images are expected as {train.place}/<class>/<image>"
        )
    _check_alike(classes, train.place)
    for name in classes:
        if not name.isprintable():  # also bytes that are not UTF-8
            raise SourceError(f"the class {name!r} in {train.place} has a name that cannot be written")
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[SourceImage]] = {}
    for split, part in parts.items():
        found = []
        for path, class_id, file, offset, size in part.images:
            if class_id not in labels:
                _check_alike([*classes, class_id], f"{part.place} and {train.place}")
                raise SourceError(f"the class {class_id} is in {part.place} but not in {train.place}")
            found.append(SourceImage(path, labels[class_id], file, offset, size))
        splits[split] = sorted(found, key=lambda source: (source.label, source.path))
    if val_fraction is not None:
        splits = _hold_out(splits["train"], val_fraction, seed)
    for split, sources in splits.items():
        if not sources:
            raise SourceError(f"{parts.get(split, train).place} has no files for the split '{split}'")
    untrained = set(range(len(classes))) - {source.label for source in splits["train"]}
    if untrained:
        listed = ", ".join(classes[label] for label in sorted(untrained))
        raise SourceError(f"{train.place} has no files for the classes {listed}: add some or remove these")
    return Sources(classes, splits, [stray for part in parts.values() for stray in part.strays], names)


def _check_alike(names: Iterable[str], place: str) -> None:
    """Refuse names that look the same and are not, as é in one character and as e with an accent are."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise SourceError(
                f"{place}: the classes {other!a} and {name!a} look alike, being {name} in two "
                "Unicode normal forms (NFC and NFD, as macOS writes): rename one, or join them"
            )


def _in_order(classes: Iterable[str]) -> list[str]:
    """By size if all are decimal numbers, which are labels already: 2 comes before 10."""
    if all(re.fullmatch("[0-9]{1,18}", name) for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def _hold_out(sources: list[SourceImage], fraction: float, seed: int) -> dict[str, list[SourceImage]]:
    """The same fraction of each class for validation, drawn by the seed."""
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
