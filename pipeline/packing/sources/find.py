"""Find the images to pack: the files of each split, their labels, and the names of the classes."""

import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.locations import is_url
from pipeline.messages import join_names, pluralize
from pipeline.packing.sources.class_ids import (
    check_no_lookalikes,
    check_printable,
    confusable_pairs,
    sort_classes,
)
from pipeline.packing.sources.class_names import read_class_names
from pipeline.packing.sources.folders import find_splits
from pipeline.packing.sources.listing import InputFolder, LocalFolder, SourceError, SplitFiles
from pipeline.packing.sources.remote import RemoteFolder
from pipeline.packing.sources.tables import is_table, read_table
from pipeline.packing.storage import STATE_FOLDER
from pipeline.packing.workers import warn
from pipeline.remote_errors import redact
from pipeline.retry import with_retries
from pipeline.storage import absolute


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
    exist. sequential, unused: as in SplitFiles. litter, unlisted: as in InputFolder. warnings: sentences
    about probable mistakes.
    """

    classes: list[str]
    splits: dict[str, list[SourceImage]]
    strays: list[str]
    names: dict[str, str] = field(default_factory=dict)
    table: str | None = None
    sequential: frozenset[str] = frozenset()
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
            parts, read_names = read_table(table, val_fraction)
        else:
            folder = open_folder(str(input))
            parts, read_names = find_splits(folder, val_fraction)
        found = _assign_labels(parts, val_fraction, seed)
        names = read_class_names(class_names, found.classes) if class_names else read_names()
    except (OSError, SourceError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"--input {input} cannot be read: {error}"
        elif folder and folder.unlisted:
            message += f". {describe_unlisted(folder.unlisted)}"
        raise SourceError(message.replace(str(input), redact(str(input)))) from error
    if class_names:
        check_no_lookalikes([*found.classes, *names], f"--class-names {class_names} and --input {input}")
        if nameless := [each for each in found.classes if each not in names]:
            found.warnings.append(
                f"--class-names {class_names} has no name for the classes {join_names(nameless)}"
            )
    found = replace(found, table=table, names=names)
    if folder is None:
        return found
    litter = frozenset(path for path in folder.litter if path.rpartition("/")[2] != STATE_FOLDER)
    return replace(found, litter=litter, unlisted=folder.unlisted)


def open_folder(name: str) -> InputFolder:
    """Open an input folder. Raises SourceError if there is none, and OSError."""
    name = name.removeprefix("file://")  # fsspec does not follow links there
    if is_url(name):
        return RemoteFolder(name)
    problem = "does not exist"
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(with_retries(Path(name).stat, warn).st_mode):
            return LocalFolder(name)
        problem = "is neither a folder nor a table (.csv, .tsv or .parquet)"
    raise SourceError(f"--input {name} {problem}")


def describe_unlisted(folders: Mapping[str, str]) -> str:
    """Name the folders that could not be listed. folders: the reason for each."""
    listed = join_names(f"{path} ({reason})" for path, reason in sorted(folders.items()))
    return f"{pluralize(len(folders), 'folder', 'folders')} of --input cannot be listed: {listed}"


def _assign_labels(found: dict[str, SplitFiles], val_fraction: float | None, seed: int) -> Sources:
    """Number the classes, and check that each split has images, and that train has images of each class."""
    train = found["train"]
    classes = sort_classes(train.classes)
    if not classes:
        raise SourceError(
            f"{train.location} has no class folders: images are expected as {train.location}/<class>/<image>"
        )
    check_no_lookalikes(classes, train.location)
    check_printable(classes, train.location)
    labels = {name: label for label, name in enumerate(classes)}
    splits = {split: _label_images(files, labels, train.location) for split, files in found.items()}
    if val_fraction is not None:
        splits = _hold_out(splits["train"], val_fraction, seed)
    for split, images in splits.items():
        if images:
            continue
        if split == "val" and val_fraction is not None and splits["train"]:
            raise SourceError(
                f"--val-fraction {val_fraction:g} holds out no image of {train.location}: add images, or use "
                "a larger fraction"
            )
        raise SourceError(f"{found.get(split, train).location} has no files for the split '{split}'")
    trained = {source.label for source in splits["train"]}
    untrained = [each for each in classes if labels[each] not in trained and each not in train.incomplete]
    if untrained:
        raise SourceError(
            f"{train.location} has no files for the classes {join_names(untrained)}: add images, or remove "
            "the classes"
        )
    strays = [stray for files in found.values() for stray in files.strays]
    sequential = frozenset().union(*(files.sequential for files in found.values()))
    unused = [name for files in found.values() for name in files.unused]
    sources = Sources(classes, splits, strays, sequential=sequential, unused=unused)
    incomplete = set[str]().union(*(files.incomplete for files in found.values()))
    warnings = [warning for files in found.values() for warning in files.warnings]
    return replace(sources, warnings=warnings + _warnings_about(sources, incomplete))


def _label_images(files: SplitFiles, labels: dict[str, int], train: str) -> list[SourceImage]:
    """Return the images of a split, sorted by label and path. train: where the classes of train are."""
    images: list[SourceImage] = []
    unknown: dict[str, None] = {}  # classes, in their order
    for path, class_id, file, offset, size in files.images:
        if class_id in labels:
            images.append(SourceImage(path, labels[class_id], file, offset, size))
        else:
            unknown.setdefault(class_id)
    if unknown:
        check_no_lookalikes([*labels, *unknown], f"{files.location} and {train}")
        raise SourceError(
            f"{files.location} has classes that are not in {train}: {join_names(unknown)}. Rename them to "
            "classes of train, or remove them"
        )
    return sorted(images, key=lambda source: (source.label, source.path))


def _warnings_about(found: Sources, incomplete: Collection[str]) -> list[str]:
    """Describe probable mistakes that do not prevent packing. incomplete: as in SplitFiles."""
    warnings = []
    if pairs := [f"{one!r} and {other!r}" for one, other in confusable_pairs(found.classes)]:
        warnings.append(
            f"these classes differ only in capitals, blanks or hidden characters: {join_names(pairs)}"
        )
    known = {found.classes[source.label] for source in found.splits["val"]}.union(incomplete)
    if others := [name for name in found.classes if name not in known]:
        warnings.append(f"there are no validation images of the classes {join_names(others)}")
    return warnings


def _hold_out(sources: list[SourceImage], fraction: float, seed: int) -> dict[str, list[SourceImage]]:
    """Hold out the same fraction of each class for validation, chosen by the seed."""
    rng = np.random.default_rng((seed, 1))
    labels = np.array([source.label for source in sources])
    held = np.zeros(len(sources), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # The last image of a class stays in train.
        held[rng.permutation(members)[: min(round(len(members) * fraction), len(members) - 1)]] = True
    return {
        "train": [source for source, out in zip(sources, held, strict=True) if not out],
        "val": [source for source, out in zip(sources, held, strict=True) if out],
    }
