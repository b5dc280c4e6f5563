"""What files beside the images say: the labels of ILSVRC's validation images, the names of classes.

Labels are taken from the first of these that is there:

    LOC_val_solution.csv                   Kaggle's
    val.txt, synset_labels.txt             lines of a file and its class id, or of class ids
    or imagenet_2012_validation_synset_labels.txt   alone in the order of the files' names
    ILSVRC2012_validation_ground_truth.txt the devkit's, lines of its numbers for classes, which
                                           map_clsloc.txt (lines of class ids in their order, as in
                                           later devkits) or the devkit's meta.mat translates

and names from LOC_synset_mapping.txt, synset_words.txt or meta.mat. They lie in the input folder,
in its `data`, or in the devkit, extracted or not. ILSVRC2010's are taken in the same way.
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
from pipeline.packing.sources.listing import InputFolder, SourceError

_LISTS = ("val.txt", "synset_labels.txt", "imagenet_2012_validation_synset_labels.txt")
_GROUND_TRUTHS = tuple(f"ILSVRC{year}_validation_ground_truth.txt" for year in (2012, 2010))
_CLASS_LIST, _META = "map_clsloc.txt", "meta.mat"
_NAMES = ("LOC_synset_mapping.txt", "synset_words.txt")


class _Found(NamedTuple):
    place: str
    content: bytes

    def lines(self) -> list[str]:
        try:
            return self.content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.place} is not text in UTF-8: {error}") from None


class Annotations:
    """The files beside the images of an input folder."""

    def __init__(self, folder: InputFolder, beside: tuple[str, ...] = ()):
        """beside: other folders to look into."""
        folders, files = folder.entries()
        devkits = [name for name in folders if "devkit" in name]
        inside = ("data", *devkits, *(f"{name}/data" for name in devkits))
        self.places = (folder.name, *map(folder.locate, inside), *beside)
        self.archives = [
            folder.locate(name) for name in files if "devkit" in name and name.endswith(("gz", ".tar"))
        ]

    def classes(self, names: list[str]) -> dict[str, str]:
        """The class id of each of all validation images, which are sorted by name."""
        if found := self._first("LOC_val_solution.csv"):
            classes = _of_kaggle(found)
        elif found := self._first(*_LISTS):
            classes = _of_list(found, names)
        elif found := self._first(*_GROUND_TRUTHS):
            classes = self._of_numbers(found, names)
        else:
            raise SourceError(
                f"the labels of the validation images are not in {self.places[0]}: put the devkit "
                f"(ILSVRC2012_devkit_t12.tar.gz), LOC_val_solution.csv or {_LISTS[0]} (lines of a file and "
                "its class id) there, or sort the images into class folders"
            )
        without = [name for name in names if Path(name).stem not in classes]
        if without:
            raise SourceError(
                f"{found.place} has no label for {without[0]}, for {len(without):,} images in all"
            )
        return {name: classes[Path(name).stem] for name in names}

    def names(self) -> dict[str, str]:
        """The names of classes by class id, where a file has them."""
        if found := self._first(*_NAMES):
            return parse_class_names(found.lines())
        return dict(self._meta.values()) if self._first(_META) else {}

    def _of_numbers(self, truth: _Found, names: list[str]) -> dict[str, str]:
        """By the devkit: the n-th line has the number of the class of the n-th image."""
        if found := self._first(_CLASS_LIST):
            ids = dict(enumerate(_in_order(found), 1))
        elif found := self._first(_META):
            ids = {number: class_id for number, (class_id, _) in self._meta.items()}
        else:
            raise SourceError(
                f"{truth.place} has numbers for classes: put the devkit's {_META} beside it, or "
                f"{_CLASS_LIST} with a class id on each line, in the devkit's order"
            )
        classes = []
        for number, line in enumerate(truth.lines(), 1):
            if not (line.strip().isdecimal() and int(line) in ids):
                raise SourceError(f"{truth.place}, line {number}: {line!r} is not a number in {found.place}")
            classes.append(ids[int(line)])
        return _in_turn(truth, names, classes)

    def _first(self, *names: str) -> _Found | None:
        for name in names:
            for place in self.places:
                try:
                    return _Found(f"{place}/{name}", storage.read(f"{place}/{name}"))
                except (FileNotFoundError, NotADirectoryError):
                    continue
            if name in self._devkit:
                return self._devkit[name]
        return None

    @cached_property
    def _devkit(self) -> dict[str, _Found]:
        """Files of a devkit that is not extracted, by their last name."""
        found = {}
        for archive in self.archives:
            content = BytesIO(storage.read(archive))
            try:
                with tarfile.open(fileobj=content) as tar:
                    for member in tar:
                        name, file = Path(member.name).name, tar.extractfile(member)
                        if file and name in (*_GROUND_TRUTHS, _CLASS_LIST, _META):
                            found[name] = _Found(f"{archive}/{member.name}", file.read())
            except (tarfile.TarError, EOFError, OSError, zlib.error):
                raise SourceError(f"{archive} is damaged, or no tar.gz: download it again") from None
        return found

    @cached_property
    def _meta(self) -> dict[int, tuple[str, str]]:
        """Class id and name by the devkit's number."""
        found = self._first(_META)
        assert found
        try:
            from scipy.io import loadmat
        except ImportError:
            raise SourceError(
                f"{found.place} needs scipy: pip install 'alexnet-train[imagenet]', or do without that file: "
                f"give {_CLASS_LIST} for the labels and --class-names for the names"
            ) from None
        try:
            synsets = np.atleast_1d(loadmat(BytesIO(found.content), squeeze_me=True)["synsets"])
            number = next(name for name in synsets.dtype.names or () if name.endswith("_ID"))
            return {int(row[number]): (str(row["WNID"]), str(row["words"])) for row in synsets}
        except Exception as error:  # scipy breaks in many ways over a broken file
            raise SourceError(f"{found.place} is not the devkit's: {type(error).__name__}: {error}") from None


def is_image(name: str) -> bool:
    """Whether a file among validation images is to have a label; people leave scripts there."""
    return name.lower().endswith((".jpeg", ".jpg", ".png"))


def parse_class_names(lines: list[str]) -> dict[str, str]:
    """Names by class id, from lines of an id, white space and a name; a tab ends the name."""
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[0]: pair[1].split("\t")[0].strip() for pair in pairs if len(pair) == 2}


def read_class_names(path: Path | None) -> dict[str, str]:
    """The content of --class-names."""
    if path is None:
        return {}
    try:
        return parse_class_names(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--class-names {path} cannot be read: {error}") from None


def _of_kaggle(found: _Found) -> dict[str, str]:
    rows = csv.DictReader(StringIO("\n".join(found.lines())))
    try:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, AttributeError, IndexError):
        raise SourceError(
            f"{found.place}, line {rows.line_num}: no ImageId, or no class in PredictionString"
        ) from None


def _of_list(found: _Found, names: list[str]) -> dict[str, str]:
    rows = [line.rsplit(maxsplit=1) for line in found.lines() if line.strip()]
    if all(len(row) == 1 for row in rows):
        return _in_turn(found, names, [row[0] for row in rows])
    if all(len(row) == 2 for row in rows):
        return {Path(file).stem: class_id for file, class_id in rows}
    raise SourceError(f"{found.place} has lines of a file and a class id among lines of one word")


def _in_turn(found: _Found, names: list[str], classes: list[str]) -> dict[str, str]:
    if len(names) != len(classes):
        raise SourceError(
            f"{found.place} has {len(classes):,} labels and there are {len(names):,} validation images: "
            "they do not belong together, or some images are missing"
        )
    return {Path(name).stem: class_id for name, class_id in zip(names, classes, strict=True)}


def _in_order(found: _Found) -> list[str]:
    """Class ids in the devkit's order, of lines of an id, perhaps its number, and more."""
    rows = [line.split() for line in found.lines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) > 1 and row[1].isdecimal() and int(row[1]) != number:
            raise SourceError(f"{found.place}, line {number}: the number is {row[1]}")
    ids = [row[0] for row in rows]
    if len(ids) == 1000 and ids == sorted(ids):
        raise SourceError(f"{found.place} is in alphabetical order, which is not the devkit's")
    return ids
