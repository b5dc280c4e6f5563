"""WebDataset's tars as an input: the image of each sample where it lies, with the label in its .cls.

    imagenet1k-train-0000.tar, …, imagenet1k-validation-00.tar, …
    train/00000.tar, …, val/00000.tar, …

The path of a tar below the input names its split, by a word: train or training; val, valid or
validation. Without such a word in any path, all tars are of train. Beside tars with one, those without
(test, say) are left out and listed in the report. Only names that end in .tar are looked at.

Members of one key that follow each other are a sample; the key is the name up to the first dot of its
last part. What follows that dot says what a member is: jpg, png, … the image, cls the label, a decimal
number. Others (json, seg.png) are not used. A sample of neither image nor label, and a member without a
key, are listed in the report.

The number is the class id. As in every form, a class is packed with its place among the classes of
train: the number itself, unless train lacks a smaller one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.sources.archives import Member, ReadAhead, members, read_each
from pipeline.packing.sources.listing import InputFolder, Labelled, SourceError, SplitFiles
from pipeline.packing.storage import UNFINISHED

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


@dataclass
class _Sample:
    key: str
    images: list[Member] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)


def find_tars(folder: InputFolder, classes: str) -> list[str]:
    """All tars below the input but those packed there, which may be this run's own output.

    None if it has class folders with images, in its folder `classes`.
    """
    for name in folder.entries(classes)[0]:
        files = folder.files(f"{classes}/{name}" if classes else name)
        if any(file.lower().rpartition(".")[2] in _IMAGES for file in files):
            return []
    names = folder.files("")
    marks = (f"/{MANIFEST_NAME}", f"/{UNFINISHED}/plan.json")
    packed = {name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)}
    return [name for name in names if name.endswith(".tar") and name.rpartition("/")[0] not in packed]


def webdataset_tars(
    folder: InputFolder, tars: list[str], val_fraction: float | None
) -> dict[str, SplitFiles]:
    """The splits of the tars, of which val is still to be held out if there is only train."""
    splits, unused = _by_split(folder, tars)
    _check_splits(folder, splits, val_fraction)
    parts = {"train": _part(folder, "train", splits["train"], unused)}
    if val_fraction is None:
        parts["val"] = _part(folder, "val", splits["val"], [])
    return parts


def _by_split(folder: InputFolder, tars: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The tars of train and val, and those of neither."""
    splits: dict[str, list[str]] = {"train": [], "val": []}
    unnamed: list[str] = []
    for tar in tars:
        named = {_SPLITS[word] for word in re.findall(r"[^\W\d_]+", tar.lower()) if word in _SPLITS}
        if len(named) > 1:
            raise SourceError(f"{folder.locate(tar)} is named both train and val below --input: rename it")
        (splits[named.pop()] if named else unnamed).append(tar)
    if unnamed == tars:
        return {"train": tars, "val": []}, []
    return splits, unnamed


def _check_splits(folder: InputFolder, splits: dict[str, list[str]], val_fraction: float | None) -> None:
    """Refuse tars of which it is unclear what is to be kept for validation."""
    if not splits["train"]:
        raise SourceError(f"{folder.name} has {splits['val'][0]}, but no tar is named train")
    if splits["val"] and val_fraction is not None:
        raise SourceError(f"{folder.name} has a val of its own: leave --val-fraction away")
    if not splits["val"] and val_fraction is None:
        raise SourceError(
            f"{folder.name} has {splits['train'][0]}, but no tar is named val: add it, or keep a tenth of "
            "each class for validation with --val-fraction 0.1"
        )


def _part(folder: InputFolder, split: str, tars: list[str], unused: list[str]) -> SplitFiles:
    place, images, strays = f"{folder.name} (tars of {split})", [], unused.copy()
    for found, others in read_each(folder.name, partial(_read_tar, folder), tars):
        images += found
        strays += others
    if not images:
        raise SourceError(f"{place} has no sample with an image (.jpg, …) and its label (.cls)")
    return SplitFiles(place, list({image.class_id for image in images}), images, strays)


def _read_tar(folder: InputFolder, tar: str) -> tuple[list[Labelled], list[str]]:
    """The images of a tar, and what is neither image nor label."""
    file, images, strays = folder.locate(tar), [], []
    for sample in _samples(file, folder.size(tar)):
        if sample.images or sample.labels:
            image, class_id = _check(sample, file)
            images.append(Labelled(f"{tar}/{image.name}", class_id, file, image.offset, image.size))
        else:
            strays.append(f"{tar}/{sample.key}")
    return images, strays


def _samples(file: str, end: int) -> Iterator[_Sample]:
    read, sample = ReadAhead(end), _Sample("")
    for member in members(file, 0, end, read):
        match = _NAME.fullmatch(member.name)
        if not match:  # WebDataset's readers, too, pass over it within a sample
            yield _Sample(member.name)
            continue
        key, extension = match[1], match[2].lower()
        if key != sample.key:
            if sample.key:
                yield sample
            sample = _Sample(key)
        if extension in _IMAGES:
            sample.images.append(member)
        elif extension == "cls":
            sample.labels.append(read(file, member.offset, member.size))
    if sample.key:
        yield sample


def _check(sample: _Sample, file: str) -> tuple[Member, str]:
    """The image and its class id."""
    place = f"{file}, sample {sample.key}:"
    if len(sample.images) > 1:
        raise SourceError(f"{place} two images, {sample.images[0].name} and {sample.images[1].name}")
    if not sample.images:
        raise SourceError(f"{place} a label (.cls) without an image, which is expected next to it")
    if not sample.labels:
        raise SourceError(
            f"{place} an image without a label: add a .cls with a decimal number next to it, or extract the "
            "images and give a table of them (CSV) as --input"
        )
    label = _LABEL.fullmatch(sample.labels[0])
    if len(sample.labels) > 1 or not label:
        found = b" and ".join(sample.labels)[:60]
        raise SourceError(f"{place} one decimal number is expected as the label (.cls), not {found!r}")
    return sample.images[0], str(int(label[1]))
