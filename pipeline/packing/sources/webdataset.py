"""Find the images in WebDataset tars whose labels are in the samples' .cls members.

    imagenet1k-train-0000.tar, …, imagenet1k-validation-00.tar, …
    train/00000.tar, …, val/00000.tar, …

A word in the path of a tar, relative to the input, names its split, as in splits.py. If no path has such a
word, all tars belong to train. If some have one, tars without one are left out and listed in the report.
Those of test are not used. Only files whose names end in .tar, or in the suffix of a compressed tar (.tar.gz,
.tgz, .tar.xz, …), are considered.

Consecutive members with the same key form a sample; the key is the path up to the first dot in the file name.
The rest of the name is the member's type: jpg, png, … for the image, and cls for the label, a decimal number.
Other types (json, seg.png) are not used. Samples with neither an image nor a label, and members without a
key, are listed in the report.

The number is the class id. As for every form of input, the packed label is the index of the class among the
classes of train, which is the number itself unless train lacks a class with a smaller number.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.sources import compressed
from pipeline.packing.sources.archives import Member, Read, members, opened_tar, read_each
from pipeline.packing.sources.listing import (
    IMAGES,
    InputFolder,
    LabelledImage,
    SourceError,
    SplitFiles,
)
from pipeline.packing.sources.splits import by_split, check_splits
from pipeline.packing.storage import STATE_FOLDER

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


@dataclass
class _Sample:
    key: str
    images: list[Member] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)


def find_tars(folder: InputFolder) -> list[str]:
    """Return all tars in the input, except those of packed datasets, such as this run's own output."""
    names = folder.files("")
    packed = {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST_NAME}")}
    packed |= {path.rpartition("/")[0] for path in folder.litter if path.endswith(f"/{STATE_FOLDER}")}
    endings = (".tar", *compressed.SUFFIXES)
    return [name for name in names if name.endswith(endings) and name.rpartition("/")[0] not in packed]


def webdataset_tars(
    folder: InputFolder, tars: list[str], val_fraction: float | None
) -> dict[str, SplitFiles]:
    """Read the splits of the tars.

    With val_fraction there is only train, from which val is still to be held out. Raises SourceError if a tar
    or sample is not as expected, and OSError.
    """
    splits, unnamed = by_split(folder.name, tars)
    check_splits(folder.name, splits, "tar", val_fraction)
    found = {"train": _split_files(folder, "train", splits["train"], unnamed)}
    found["train"].unused.extend(splits["test"])
    if val_fraction is None:
        found["val"] = _split_files(folder, "val", splits["val"], [])
    return found


def _split_files(folder: InputFolder, split: str, tars: list[str], unnamed: list[str]) -> SplitFiles:
    location, images, strays, sequential = f"{folder.name} (tars of {split})", [], unnamed.copy(), set()
    contents = read_each(folder.name, partial(_read_tar, folder), tars)
    for tar, (in_tar, strays_in_tar, is_compressed) in zip(tars, contents, strict=True):
        images += in_tar
        strays += strays_in_tar
        if is_compressed:
            sequential.add(folder.locate(tar))
    if not images:
        raise SourceError(f"{location} has no sample with an image (.jpg, …) and its label (.cls)")
    classes = list({image.class_id for image in images})
    return SplitFiles(location, classes, images, strays, frozenset(sequential))


def _read_tar(folder: InputFolder, tar: str) -> tuple[list[LabelledImage], list[str], bool]:
    """Return the images of a tar, the paths of samples with neither an image nor a label, and whether it is
    compressed."""
    file, images, strays = folder.locate(tar), [], []
    with opened_tar(folder, tar) as (read, end, is_compressed):
        wanted = (member for member in members(file, 0, end, read) if folder.wants(f"{tar}/{member.name}"))
        for sample in _samples(file, read, wanted):
            if sample.images or sample.labels:
                image, class_id = _image_and_label(sample, file)
                images.append(LabelledImage(f"{tar}/{image.name}", class_id, file, image.offset, image.size))
            else:
                strays.append(f"{tar}/{sample.key}")
    return images, strays, is_compressed


def _samples(file: str, read: Read, found: Iterable[Member]) -> Iterator[_Sample]:
    sample = _Sample("")
    for member in found:
        match = _NAME.fullmatch(member.name)
        if not match:  # it has no key; WebDataset's readers also skip it within a sample
            yield _Sample(member.name)
            continue
        key, extension = match[1], match[2].lower()
        if key != sample.key:
            if sample.key:
                yield sample
            sample = _Sample(key)
        if extension in IMAGES:
            sample.images.append(member)
        elif extension == "cls":
            sample.labels.append(read(file, member.offset, member.size))
    if sample.key:
        yield sample


def _image_and_label(sample: _Sample, file: str) -> tuple[Member, str]:
    """Return the sample's image and class id. Raises SourceError unless it has exactly one of each."""
    name = f"{file}, sample {sample.key}:"
    if len(sample.images) > 1:
        raise SourceError(f"{name} there are two images, {sample.images[0].name} and {sample.images[1].name}")
    if not sample.images:
        raise SourceError(f"{name} there is a label (.cls), but no image next to it")
    if not sample.labels:
        raise SourceError(
            f"{name} there is an image but no label: add a .cls with a decimal number next to the image, or "
            "extract the images and pass a table (CSV) of them as --input"
        )
    label = _LABEL.fullmatch(sample.labels[0])
    if len(sample.labels) > 1 or not label:
        found = b" and ".join(sample.labels)[:60]
        raise SourceError(f"{name} the label (.cls) must be one decimal number, not {found!r}")
    return sample.images[0], str(int(label[1]))
