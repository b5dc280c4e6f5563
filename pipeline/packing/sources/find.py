"""Find the images to pack: the files of each split, their labels, and the names of the classes."""

import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.packing.sources.class_ids import (
    check_alike,
    check_printable,
    count,
    few,
    in_order,
    nearly_alike,
)
from pipeline.packing.sources.class_names import read_class_names
from pipeline.packing.sources.folders import find_parts
from pipeline.packing.sources.listing import InputFolder, LocalFolder, SourceError, SplitFiles
from pipeline.packing.sources.remote import RemoteFolder
from pipeline.packing.sources.tables import is_table, read_table
from pipeline.packing.storage import UNFINISHED, absolute, is_url
from pipeline.packing.workers import say
from pipeline.retry import patiently


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

    classes: ids in the order of their labels. splits: the images of each split, sorted by label and path.
    strays: files outside any class folder, which cannot be packed. names: the names of classes by id. table:
    the table that lists the files, if there is one; the files may then not exist. sealed and unused: as in
    SplitFiles. litter and unlisted: as in InputFolder. warnings: what is probably not meant.
    """

    classes: list[str]
    splits: dict[str, list[SourceImage]]
    strays: list[str]
    names: dict[str, str] = field(default_factory=dict)
    table: str | None = None
    sealed: frozenset[str] = frozenset()
    unused: list[str] = field(default_factory=list)
    litter: frozenset[str] = frozenset()
    unlisted: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_sources(
    input: str | Path, val_fraction: float | None, seed: int, class_names: Path | None = None
) -> Sources:
    """Find the images of a folder or a table, local or behind a URL; folders.py lists the supported forms.

    val_fraction: the fraction of each class to hold out for validation, or None if the input has a validation
    split. seed: of the choice of those images. class_names: the file of --class-names. Raises SourceError if
    there is nothing to pack, or if it is unclear which images are for validation.
    """
    table, folder = None, None
    try:
        if is_table(str(input)) and not Path(input).is_dir():
            table = absolute(str(input))
            files, read_names = read_table(table, val_fraction)
        else:
            folder = open_folder(str(input))
            parts, names_of = find_parts(folder, val_fraction)
        found = _number(parts, val_fraction, seed)
        names = read_class_names(class_names, found.classes) if class_names else names_of()
    except OSError as error:
        raise SourceError(f"--input {input} cannot be read: {error}") from error
    except SourceError as error:
        if folder is None or not folder.unlisted:
            raise
        raise SourceError(f"{error}. {describe_unlisted(folder.unlisted)}") from error
    if class_names:
        check_alike([*found.classes, *names], f"--class-names {class_names} and --input {input}")
        if nameless := [each for each in found.classes if each not in names]:
            found.warnings.append(f"--class-names {class_names} has no name for the classes {few(nameless)}")
    found = replace(found, table=table, names=names)
    if folder is None:
        return found
    litter = frozenset(path for path in folder.litter if path.rpartition("/")[2] != UNFINISHED)
    return replace(found, litter=litter, unlisted=folder.unlisted)


def open_folder(name: str) -> InputFolder:
    """Open an input folder. Raises SourceError if there is none, and OSError."""
    name = name.removeprefix("file://")  # fsspec does not follow links there
    if is_url(name):
        return RemoteFolder(name)
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(patiently(Path(name).stat, say).st_mode):
            return LocalFolder(name)
    raise SourceError(f"--input {name} is neither a folder nor a table (.csv, .tsv or .parquet)")


def describe_unlisted(folders: Mapping[str, str]) -> str:
    """Name the folders that could not be listed. folders: the reason for each."""
    listed = few([f"{path} ({reason})" for path, reason in sorted(folders.items())])
    return f"{count(len(folders), 'folder', 'folders')} of --input cannot be listed: {listed}"


def _number(parts: dict[str, SplitFiles], val_fraction: float | None, seed: int) -> Sources:
    """Number the classes, and check that there are images to train and validate on."""
    train = parts["train"]
    classes = in_order(train.classes)
    if not classes:
        raise SourceError(
            f"{train.location} has no class folders: images are expected as {train.location}/<class>/<image>"
        )
    check_alike(classes, train.location)
    check_printable(classes, train.location)
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[SourceImage]] = {}
    for split, part in parts.items():
        images: list[SourceImage] = []
        unknown: dict[str, None] = {}  # classes, in their order
        for path, class_id, file, offset, size in part.images:
            if class_id in labels:
                images.append(SourceImage(path, labels[class_id], file, offset, size))
            else:
                unknown.setdefault(class_id)
        if unknown:
            check_alike([*classes, *unknown], f"{part.location} and {train.location}")
            raise SourceError(
                f"the class {few(unknown)} is in {part.location} but not in {train.location}: rename it to "
                "one of those, or remove it"
            )
        splits[split] = sorted(images, key=lambda source: (source.label, source.path))
    if val_fraction is not None:
        splits = _hold_out(splits["train"], val_fraction, seed)
    for split, sources in splits.items():
        if not sources:
            raise SourceError(f"{parts.get(split, train).location} has no files for the split '{split}'")
    trained = {source.label for source in splits["train"]}
    untrained = [each for each in classes if labels[each] not in trained and each not in train.incomplete]
    if untrained:
        raise SourceError(
            f"{train.location} has no files for the classes {few(untrained)}: add images, or remove the "
            "classes"
        )
    strays = [stray for part in parts.values() for stray in part.strays]
    sealed = frozenset().union(*(part.sealed for part in parts.values()))
    unused = [name for part in parts.values() for name in part.unused]
    found = Sources(classes, splits, strays, sealed=sealed, unused=unused)
    incomplete = set[str]().union(*(part.incomplete for part in parts.values()))
    doubts = [doubt for part in parts.values() for doubt in part.doubts]
    return replace(found, warnings=doubts + _doubts(found, incomplete))


def _doubts(found: Sources, incomplete: Collection[str]) -> list[str]:
    """Describe what can be packed, but is probably not meant. incomplete: as in SplitFiles."""
    doubts = []
    if pairs := [f"{one!r} and {other!r}" for one, other in nearly_alike(found.classes)]:
        doubts.append(f"these classes differ only in capitals, blanks or hidden characters: {few(pairs)}")
    known = {found.classes[source.label] for source in found.splits["val"]}.union(incomplete)
    if others := [name for name in found.classes if name not in known]:
        doubts.append(f"there are no validation images of the classes {few(others)}")
    return doubts


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
