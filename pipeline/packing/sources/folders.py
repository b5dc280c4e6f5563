"""Recognise the form of an input folder, and find the images of each split.

The forms:

    train/<class>/…, val/<class>/…         class folders; val may be flat if there are labels for it
    [ILSVRC/]Data/CLS-LOC/{train,val}      Kaggle's download, with a flat val
    train/<class>/images/…, val/images/…   Tiny ImageNet, with the labels in val/val_annotations.txt
    train/<class>.tar, val/…               class tars, as ILSVRC's tar of training images contains them
    ILSVRC2012_img_{train,val}.tar         not extracted; a folder train or val is preferred to its tar
    <class>/…                              with --val-fraction
    *.tar                                  WebDataset tars at any depth, if there is none of the forms above
    *.parquet                              Hugging Face's files of images at any depth, likewise

splits.py says by which other names train and val are known. A folder test is not used.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.locations import is_url
from pipeline.messages import join_names
from pipeline.packing.sources.archives import (
    class_tars,
    flat_tar,
    folder_of_class_tars,
    is_folder_of_class_tars,
)
from pipeline.packing.sources.labels import TINY, Annotations
from pipeline.packing.sources.listing import InputFolder, LabelledImage, SourceError, SplitFiles, is_image
from pipeline.packing.sources.parquet import find_parquet, parquet_images
from pipeline.packing.sources.splits import check_splits, split_folders, split_of
from pipeline.packing.sources.webdataset import find_tars, webdataset_tars

_KAGGLE = "Data/CLS-LOC"
_BASES = ("", _KAGGLE, f"ILSVRC/{_KAGGLE}")  # folders that may contain train and val
_TAR = re.compile(r"ILSVRC20\d\d_(?:img|images)_(train|val)\.tar")


def find_splits(
    folder: InputFolder, val_fraction: float | None
) -> tuple[dict[str, SplitFiles], Callable[[], dict[str, str]]]:
    """Find the files of each split, and a function that returns the readable names of classes by class id.

    With val_fraction there is only train, from which val is still to be held out. Raises SourceError if the
    form of the input is unclear, and OSError.
    """
    base, folders = _split_folders(folder)
    if val_fraction is not None and _is_class(folder, folders):
        folders = {}
    tars = _imagenet_tars(folder)
    train, val = (folders.get(split) for split in ("train", "val"))
    others = (_parent(folder),) if base == _KAGGLE else ()
    annotations = Annotations(folder, (*others, *([folder.locate(val)] if val else ())))
    has_class_tars = not tars and is_folder_of_class_tars(folder, train or "")
    if not tars and not has_class_tars and not _has_class_folders(folder, train or ""):
        if shards := find_tars(folder):
            _check_complete(folder, "tars")
            return webdataset_tars(folder, shards, val_fraction), annotations.names
        if not folders and (files := find_parquet(folder)):
            _check_complete(folder, "Parquet files")
            splits, names = parquet_images(folder.locate(""), files, val_fraction)
            return splits, lambda: names
    classes = folder_of_class_tars if has_class_tars else class_folders
    if not folders and not tars:
        if val_fraction is None:
            raise SourceError(_without_splits(folder))
        return {"train": classes(folder, "", "")}, annotations.names
    found = {split: [(folders | tars)[split]] for split in folders.keys() | tars.keys()}
    check_splits(folder.name, found, "folder or tar" if tars else "folder", val_fraction)
    parts = {"train": classes(folder, train, "train") if train else class_tars(folder, tars["train"])}
    parts["train"].unused.extend(found.get("test", []))
    if val_fraction is None:
        parts["val"] = (
            _validation(folder, val, annotations) if val else flat_tar(folder, tars["val"], annotations)
        )
    return parts, annotations.names


def _has_class_folders(folder: InputFolder, subfolder: str) -> bool:
    """Return whether a folder has class folders with images, so tars and Parquet files do not count."""
    return any(
        any(map(is_image, folder.files(_join(subfolder, name)))) for name in folder.entries(subfolder)[0]
    )


def _check_complete(folder: InputFolder, kind: str) -> None:
    """Refuse an input with folders that cannot be listed, where they may hold whole classes."""
    if folder.unlisted:
        raise SourceError(f"{folder.name} may have more {kind} than were found")


def _split_folders(folder: InputFolder) -> tuple[str, dict[str, str]]:
    """Return the base that contains the folders of the splits, and these by split."""
    for base in _BASES:
        if not base or folder.has(base):
            names = split_folders(folder.locate(base), folder.entries(base)[0])
            if "train" in names or not base:
                found = base, {split: _join(base, name) for split, name in names.items()}
            if "train" in names:
                return found
    return found


def _is_class(folder: InputFolder, folders: dict[str, str]) -> bool:
    """Return whether the only folder named after a split is a class, as that of pictures of trains may be."""
    return (
        list(folders) == ["train"]
        and len(folder.entries()[0]) > 1
        and not folder.entries(folders["train"])[0]
        and not is_folder_of_class_tars(folder, folders["train"])
    )


def _without_splits(folder: InputFolder) -> str:
    """Say what to do about an input without folders of splits, by what is there."""
    names = folder.entries()[0]
    message = f"{folder.name} has no folders train and val"
    if not names:
        return f"{message}: images are expected as {folder.locate('train')}/<class>/<image>, and so for val"
    for name in names:
        if "train" in split_folders(folder.locate(name), folder.entries(name)[0]):
            return f"{message}, but {folder.locate(name)} has: give that as --input"
    if len(names) == 1:
        return (
            f"{message}, but only a folder {names[0]}. If that contains class folders, give "
            f"{folder.locate(names[0])} as --input, with --val-fraction 0.1"
        )
    return (
        f"{message}. If it contains class folders, add --val-fraction 0.1 to hold out a tenth of each class "
        "for validation"
    )


def _validation(folder: InputFolder, subfolder: str, annotations: Annotations) -> SplitFiles:
    """Find the validation images in class folders or class tars, or in one folder with separate labels."""
    if is_folder_of_class_tars(folder, subfolder):
        return folder_of_class_tars(folder, subfolder, "val")
    folders, files = folder.entries(subfolder)
    if TINY in files and folders == ["images"]:
        return flat_folder(folder, f"{subfolder}/images", annotations)
    if folders:
        return class_folders(folder, subfolder, "val")
    return flat_folder(folder, subfolder, annotations)


def class_folders(folder: InputFolder, subfolder: str, split: str) -> SplitFiles:
    """Find the images in class folders: every file in them, at any depth and with any name.

    Raises SourceError if folders named after splits are among them, and OSError; iterating over the images
    may also raise these.
    """
    classes, strays = folder.entries(subfolder)
    location = folder.locate(subfolder)
    _refuse_splits(classes, location)
    unused, warnings, incomplete = list[str](), list[str](), set[str]()

    def images() -> Iterator[LabelledImage]:
        for class_id in classes:
            class_folder = _join(subfolder, class_id)
            names = folder.files(class_folder)
            inside = list(dict.fromkeys(name.partition("/")[0] for name in names if "/" in name))
            class_location = folder.locate(class_folder)
            if len(classes) > 1 or split:
                _refuse_splits(inside, class_location)
            elif len(inside) > 1 and all("/" in name for name in names):
                warnings.append(
                    f"{class_id} is taken for a class, but has the folders {join_names(inside)}: if "
                    f"{location} is one level too high, give {class_location} as --input"
                )
            if not folder.is_complete(class_folder):
                incomplete.add(class_id)
            for name in names:
                path = _join(split, f"{class_id}/{name}")
                if name == f"{class_id}_boxes.txt":  # in Tiny ImageNet
                    unused.append(path)
                    continue
                yield LabelledImage(path, class_id, folder.locate(f"{class_folder}/{name}"))

    strays = [_join(split, name) for name in strays]
    return SplitFiles(
        location, classes, images(), strays, unused=unused, warnings=warnings, incomplete=incomplete
    )


def _refuse_splits(names: Iterable[str], location: str) -> None:
    """Raise SourceError if folders are named after splits where classes, or parts of one, are expected."""
    found = {split: name for name in names if (split := split_of(name))}
    if "train" in found and len(found) > 1:
        raise SourceError(
            f"{location} has the folders {join_names(found.values())}, which are splits and not classes: "
            f"give {location} as --input, or merge its splits into those of --input"
        )


def flat_folder(folder: InputFolder, subfolder: str, annotations: Annotations) -> SplitFiles:
    """Find the validation images in a folder without class folders; the annotations have their labels."""
    files = folder.entries(subfolder)[1]

    def images() -> Iterator[LabelledImage]:
        names = list(filter(is_image, files))
        for name, class_id in annotations.classes(names).items() if names else ():
            yield LabelledImage(f"val/{class_id}/{name}", class_id, folder.locate(f"{subfolder}/{name}"))

    strays = [f"val/{name}" for name in files if not is_image(name)]
    return SplitFiles(folder.locate(subfolder), [], images(), strays)


def _imagenet_tars(folder: InputFolder) -> dict[str, str]:
    tars: dict[str, str] = {}
    for name in folder.entries()[1]:
        if match := _TAR.fullmatch(name):
            if match[1] in tars:
                raise SourceError(f"{folder.name} has both {tars[match[1]]} and {name}: remove one of them")
            tars[match[1]] = name
    return tars


def _parent(folder: InputFolder) -> str:
    """Return the input's parent folder, which holds Kaggle's tables if the input is its folder ILSVRC."""
    if is_url(folder.name):
        return folder.name.rpartition("/")[0]
    return str(Path(folder.name).absolute().parent)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
