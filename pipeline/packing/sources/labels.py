"""Read annotation files: the labels of the ILSVRC validation images, and the names of classes.

Labels come from the first of these files that exists:

    val_annotations.txt                    Tiny ImageNet's labels, in its folder val
    LOC_val_solution.csv                   Kaggle's labels
    val.txt, synset_labels.txt or          each line has a file and its class id, or only a class id, in the
    imagenet_2012_validation_synset_labels.txt   order of the files' names
    ILSVRC2012_validation_ground_truth.txt the devkit's labels: each line has the devkit's number of a class,
                                           which is looked up in map_clsloc.txt (class ids in the devkit's
                                           order, from later devkits) or in the devkit's meta.mat

Names come from LOC_synset_mapping.txt, synset_words.txt, words.txt (of Tiny ImageNet) or meta.mat. The files
are in the input folder, in its folder `data`, in the folder of validation images, or in the devkit, which may
be extracted or not. Those of ILSVRC2010 are read, too.
"""

import csv
import tarfile
import zlib
from functools import cached_property
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.packing import storage
from pipeline.packing.sources.class_names import parse_class_names
from pipeline.packing.sources.listing import InputFolder, SourceError

_LISTS = ("val.txt", "synset_labels.txt", "imagenet_2012_validation_synset_labels.txt")
_GROUND_TRUTHS = tuple(f"ILSVRC{year}_validation_ground_truth.txt" for year in (2012, 2010))
_CLASS_LIST, _META = "map_clsloc.txt", "meta.mat"
_NAMES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
TINY = "val_annotations.txt"


class _AnnotationFile(NamedTuple):
    """An annotation file: its path, for messages, and its content."""

    path: str
    content: bytes

    def lines(self) -> list[str]:
        try:
            return self.content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path} is not UTF-8 text: {error}") from None


class Annotations:
    """The annotation files of an input folder, which are read only when they are needed."""

    def __init__(self, folder: InputFolder, others: tuple[str, ...] = ()):
        """Look for the folders to search. others: further ones. Raises OSError."""
        folders, files = folder.entries()
        devkits = [name for name in folders if "devkit" in name]
        inside = ("data", *devkits, *(f"{name}/data" for name in devkits))
        self.folders = (folder.name, *map(folder.locate, inside), *others)
        self.archives = [
            folder.locate(name) for name in files if "devkit" in name and name.endswith(("gz", ".tar"))
        ]

    def classes(self, names: list[str]) -> dict[str, str]:
        """Return the class id of each validation image by its name. names: of all of them, sorted.

        Raises SourceError if the labels are missing or do not fit the images, and OSError.
        """
        if found := self._first(TINY):
            classes = _parse_tiny(found)
        elif found := self._first("LOC_val_solution.csv"):
            classes = _parse_kaggle(found)
        elif found := self._first(*_LISTS):
            classes = _parse_list(found, names)
        elif found := self._first(*_GROUND_TRUTHS):
            classes = self._parse_ground_truth(found, names)
        else:
            raise SourceError(
                f"{self.folders[0]} has no labels for the validation images: put the devkit "
                f"(ILSVRC2012_devkit_t12.tar.gz), LOC_val_solution.csv or {_LISTS[0]} (each line has a file "
                "and its class id) there, or sort the images into class folders"
            )
        without = [name for name in names if Path(name).stem not in classes]
        if without:
            raise SourceError(
                f"{found.path} lacks labels for {len(without):,} images, the first of which is {without[0]}"
            )
        return {name: classes[Path(name).stem] for name in names}

    def names(self) -> dict[str, str]:
        """Return the readable names of classes by class id, or none if no file has them."""
        if found := self._first(*_NAMES):
            return parse_class_names(found.lines())
        return dict(self._meta.values()) if self._first(_META) else {}

    def _parse_ground_truth(self, truth: _AnnotationFile, names: list[str]) -> dict[str, str]:
        """Return class ids from the devkit's labels: line n has the number of the class of the n-th image."""
        if found := self._first(_CLASS_LIST):
            ids = dict(enumerate(_devkit_order(found), 1))
        elif found := self._first(_META):
            ids = {number: class_id for number, (class_id, _) in self._meta.items()}
        else:
            raise SourceError(
                f"{truth.path} has numbers instead of class ids: put the devkit's {_META} next to it, or "
                f"{_CLASS_LIST} with a class id on each line, in the devkit's order"
            )
        classes = []
        for number, line in enumerate(truth.lines(), 1):
            if not (line.strip().isdecimal() and int(line) in ids):
                raise SourceError(
                    f"{truth.path}, line {number}: {line!r} is not the number of a class in {found.path}"
                )
            classes.append(ids[int(line)])
        return _by_position(truth, names, classes)

    def _first(self, *names: str) -> _AnnotationFile | None:
        for name in names:
            for folder in self.folders:
                try:
                    return _AnnotationFile(f"{folder}/{name}", storage.read(f"{folder}/{name}"))
                except (FileNotFoundError, NotADirectoryError):
                    continue
            if name in self._devkit:
                return self._devkit[name]
        return None

    @cached_property
    def _devkit(self) -> dict[str, _AnnotationFile]:
        """The annotation files in a devkit that is not extracted, by file name."""
        found = {}
        for archive in self.archives:
            content = BytesIO(storage.read(archive))
            try:
                with tarfile.open(fileobj=content) as tar:
                    for member in tar:
                        name, file = Path(member.name).name, tar.extractfile(member)
                        if file and name in (*_GROUND_TRUTHS, _CLASS_LIST, _META):
                            found[name] = _AnnotationFile(f"{archive}/{member.name}", file.read())
            except (tarfile.TarError, EOFError, OSError, zlib.error):
                raise SourceError(f"{archive} is damaged or not a tar.gz: download it again") from None
        return found

    @cached_property
    def _meta(self) -> dict[int, tuple[str, str]]:
        """The class id and name of each class, by the devkit's number."""
        found = self._first(_META)
        assert found
        try:
            from scipy.io import loadmat
        except ImportError:
            raise SourceError(
                f"reading {found.path} needs scipy: run pip install 'alexnet-train[imagenet]', or do without "
                f"that file: provide {_CLASS_LIST} for the labels and --class-names for the names"
            ) from None
        try:
            synsets = np.atleast_1d(loadmat(BytesIO(found.content), squeeze_me=True)["synsets"])
            number = next(name for name in synsets.dtype.names or () if name.endswith("_ID"))
            return {int(row[number]): (str(row["WNID"]), str(row["words"])) for row in synsets}
        except Exception as error:  # scipy raises many kinds of errors for a broken file
            raise SourceError(
                f"{found.path} is not the devkit's {_META}: {type(error).__name__}: {error}"
            ) from None


def _parse_tiny(found: _AnnotationFile) -> dict[str, str]:
    rows = [line.split("\t") for line in found.lines() if line.strip()]
    if wrong := next((number for number, row in enumerate(rows, 1) if len(row) < 2), None):
        raise SourceError(f"{found.path}, line {wrong}: expected a file, a tab and a class id")
    return {Path(row[0]).stem: row[1] for row in rows}


def _parse_kaggle(found: _AnnotationFile) -> dict[str, str]:
    rows = csv.DictReader(StringIO("\n".join(found.lines())))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, AttributeError, IndexError, csv.Error):
        raise SourceError(
            f"{found.path}, line {rows.line_num}: there is no ImageId, or no class in PredictionString"
        ) from None


def _parse_list(found: _AnnotationFile, names: list[str]) -> dict[str, str]:
    rows = [line.rsplit(maxsplit=1) for line in found.lines() if line.strip()]
    if all(len(row) == 1 for row in rows):
        return _by_position(found, names, [row[0] for row in rows])
    if all(len(row) == 2 for row in rows):
        return {Path(file).stem: class_id for file, class_id in rows}
    raise SourceError(
        f"{found.path} mixes two forms of lines: either each line must have a file and a class id, or each "
        "line only a class id"
    )


def _by_position(found: _AnnotationFile, names: list[str], classes: list[str]) -> dict[str, str]:
    if len(names) != len(classes):
        raise SourceError(
            f"{found.path} has {len(classes):,} labels, but there are {len(names):,} validation images: they "
            "do not belong together, or some images are missing"
        )
    return {Path(name).stem: class_id for name, class_id in zip(names, classes, strict=True)}


def _devkit_order(found: _AnnotationFile) -> list[str]:
    """Return class ids in the devkit's order. Each line has an id, and may have its number and more words."""
    rows = [line.split() for line in found.lines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) > 1 and row[1].isdecimal() and int(row[1]) != number:
            raise SourceError(f"{found.path}, line {number}: the number is {row[1]}, not {number}")
    ids = [row[0] for row in rows]
    if len(ids) == 1000 and ids == sorted(ids):
        raise SourceError(
            f"{found.path} is in alphabetical order, which is not the devkit's order of classes"
        )
    return ids
