"""Recognise the form of an input folder, and find the images of each split.

The forms:

    train/<class>/…, val/<class>/…         class folders; val may be flat if there are labels for it
    [ILSVRC/]Data/CLS-LOC/{train,val}      Kaggle's download, with a flat val
    train/<class>.tar, val/…               class tars, as ILSVRC's tar of training images contains them
    ILSVRC2012_img_{train,val}.tar         not extracted; a folder train or val is preferred to its tar
    <class>/…                              with --val-fraction
    *.tar                                  WebDataset tars at any depth, if there is none of the forms above
    *.parquet                              Hugging Face's files of images at any depth, likewise
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.packing import storage
from pipeline.packing.sources.archives import (
    class_tars,
    flat_tar,
    folder_of_class_tars,
    is_folder_of_class_tars,
)
from pipeline.packing.sources.labels import Annotations, is_image
from pipeline.packing.sources.listing import InputFolder, LabelledImage, SourceError, SplitFiles
from pipeline.packing.sources.parquet import find_parquet, parquet_images
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
    base = next((base for base in _BASES if "train" in folder.entries(base)[0]), "")
    folders: dict[str, str] = {
        split: _join(base, split) for split in ("train", "val") if split in folder.entries(base)[0]
    }
    tars = _imagenet_tars(folder)
    annotations = Annotations(folder, (_parent(folder),) if base == _KAGGLE else ())
    has_class_tars = not tars and is_folder_of_class_tars(folder, folders.get("train", ""))
    if not tars and not has_class_tars:
        if shards := find_tars(folder, folders.get("train", "")):
            return webdataset_tars(folder, shards, val_fraction), annotations.names
        if not folders and (files := find_parquet(folder)):
            splits, names = parquet_images(folder.locate("").rstrip("/"), files, val_fraction)
            return splits, lambda: names
    _check_splits(folder, folders, tars, val_fraction)
    classes = folder_of_class_tars if has_class_tars else class_folders
    if val_fraction is not None:
        return {"train": classes(folder, "", "")}, annotations.names
    if "train" in folders:
        train = classes(folder, folders["train"], "train")
    else:
        train = class_tars(folder, tars["train"])
    if "val" not in folders:
        val = flat_tar(folder, tars["val"], annotations)
    elif is_folder_of_class_tars(folder, folders["val"]):
        val = folder_of_class_tars(folder, folders["val"], "val")
    elif any(folder.entries(folders["val"])[0]):
        val = class_folders(folder, folders["val"], "val")
    else:
        val = flat_folder(folder, folders["val"], annotations)
    return {"train": train, "val": val}, annotations.names


def _check_splits(
    folder: InputFolder, folders: dict[str, str], tars: dict[str, str], val_fraction: float | None
) -> None:
    """Raise SourceError if it is unclear which images are for validation."""
    found = folders.keys() | tars.keys()
    if found >= {"train", "val"} and val_fraction is not None:
        raise SourceError(f"{folder.name} already has a validation split (val): omit --val-fraction")
    if "val" not in found and "train" in folders:
        raise SourceError(
            f"{folder.name} has a folder train but no folder val: add it, or pack --input "
            f"{folder.locate(folders['train'])} with --val-fraction 0.1 to hold out a tenth for validation"
        )
    if "val" not in found and "train" in tars:
        raise SourceError(
            f"{folder.name} has {tars['train']} but neither a val tar nor a folder val: add one"
        )
    if "train" not in found and val_fraction is None:
        raise SourceError(
            f"{folder.name} has no folders train and val. If it contains class folders, add "
            "--val-fraction 0.1 to hold out a tenth of each class for validation"
        )


def class_folders(folder: InputFolder, subfolder: str, split: str) -> SplitFiles:
    """Find the images in class folders: every file in them, at any depth and with any name.

    Raises OSError; iterating over the images may also raise it.
    """
    classes, strays = folder.entries(subfolder)

    def images() -> Iterator[LabelledImage]:
        for class_id in classes:
            class_folder = _join(subfolder, class_id)
            for name in folder.files(class_folder):
                path = _join(split, f"{class_id}/{name}")
                yield LabelledImage(path, class_id, folder.locate(f"{class_folder}/{name}"))

    location = folder.locate(subfolder) if subfolder else folder.name
    return SplitFiles(location, classes, images(), [_join(split, name) for name in strays])


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
    if storage.is_url(folder.name):
        return folder.name.rpartition("/")[0]
    return str(Path(folder.name).absolute().parent)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
