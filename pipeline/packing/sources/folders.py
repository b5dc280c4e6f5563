"""Which form an input folder has, and what each split is made of.

The forms:

    train/<class>/…, val/<class>/…         class folders; val may be flat if labels are beside it
    [ILSVRC/]Data/CLS-LOC/{train,val}      Kaggle's, flat val
    ILSVRC2012_img_{train,val}.tar         not extracted; a folder train or val goes before its tar
    <class>/…                              with --val-fraction
    *.tar                                  WebDataset's at any depth, where none of these is
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.packing import storage
from pipeline.packing.sources.archives import class_tars, flat_tar
from pipeline.packing.sources.labels import Annotations, is_image
from pipeline.packing.sources.listing import InputFolder, Labelled, SourceError, SplitFiles
from pipeline.packing.sources.webdataset import find_tars, webdataset_tars

_KAGGLE = "Data/CLS-LOC"
_BASES = ("", _KAGGLE, f"ILSVRC/{_KAGGLE}")  # where folders train and val are
_TAR = re.compile(r"ILSVRC20\d\d_(?:img|images)_(train|val)\.tar")


def find_parts(folder: InputFolder, val_fraction: float | None) -> tuple[dict[str, SplitFiles], Annotations]:
    """The splits of the input, of which val is still to be held out if there is only train."""
    base = next((base for base in _BASES if "train" in folder.entries(base)[0]), "")
    places: dict[str, str] = {
        split: _join(base, split) for split in ("train", "val") if split in folder.entries(base)[0]
    }
    tars = _imagenet_tars(folder)
    if not tars and (shards := find_tars(folder, places.get("train", ""))):
        return webdataset_tars(folder, shards, val_fraction), Annotations(folder)
    _check_splits(folder, places, tars, val_fraction)
    annotations = Annotations(folder, (_parent(folder),) if base == _KAGGLE else ())
    if val_fraction is not None:
        return {"train": class_folders(folder, "", "")}, annotations
    if "train" in places:
        train = class_folders(folder, places["train"], "train")
    else:
        train = class_tars(folder, tars["train"])
    if "val" not in places:
        val = flat_tar(folder, tars["val"], annotations)
    elif any(folder.entries(places["val"])[0]):
        val = class_folders(folder, places["val"], "val")
    else:
        val = flat_folder(folder, places["val"], annotations)
    return {"train": train, "val": val}, annotations


def _check_splits(
    folder: InputFolder, places: dict[str, str], tars: dict[str, str], val_fraction: float | None
) -> None:
    """Refuse an input of which it is unclear what is to be kept for validation."""
    found = places.keys() | tars.keys()
    if found >= {"train", "val"} and val_fraction is not None:
        raise SourceError(f"{folder.name} has a val of its own: leave --val-fraction away")
    if "val" not in found and "train" in places:
        raise SourceError(
            f"{folder.name} has a folder train but none named val: add it, or pack "
            f"--input {folder.locate(places['train'])} with --val-fraction 0.1 to keep a tenth for validation"
        )
    if "val" not in found and "train" in tars:
        raise SourceError(f"{folder.name} has {tars['train']} but neither its val tar nor a folder val")
    if "train" not in found and val_fraction is None:
        raise SourceError(
            f"{folder.name} has no folders train and val. If it holds class folders, "
            "--val-fraction 0.1 keeps a tenth of each for validation"
        )


def class_folders(folder: InputFolder, below: str, split: str) -> SplitFiles:
    """Every file in a class folder counts, at any depth and whatever its name."""
    classes, strays = folder.entries(below)

    def images() -> Iterator[Labelled]:
        for class_id in classes:
            place = _join(below, class_id)
            for name in folder.files(place):
                path = _join(split, f"{class_id}/{name}")
                yield Labelled(path, class_id, folder.locate(f"{place}/{name}"))

    place = folder.locate(below) if below else folder.name
    return SplitFiles(place, classes, images(), [_join(split, name) for name in strays])


def flat_folder(folder: InputFolder, below: str, annotations: Annotations) -> SplitFiles:
    """A folder of validation images, whose labels stand elsewhere."""
    files = folder.entries(below)[1]

    def images() -> Iterator[Labelled]:
        names = list(filter(is_image, files))
        for name, class_id in annotations.classes(names).items() if names else ():
            yield Labelled(f"val/{class_id}/{name}", class_id, folder.locate(f"{below}/{name}"))

    strays = [f"val/{name}" for name in files if not is_image(name)]
    return SplitFiles(folder.locate(below), [], images(), strays)


def _imagenet_tars(folder: InputFolder) -> dict[str, str]:
    tars: dict[str, str] = {}
    for name in folder.entries()[1]:
        if match := _TAR.fullmatch(name):
            if match[1] in tars:
                raise SourceError(f"{folder.name} has {tars[match[1]]} and {name}: keep one of them there")
            tars[match[1]] = name
    return tars


def _parent(folder: InputFolder) -> str:
    """Where Kaggle's tables are, if the input is the folder ILSVRC beside them."""
    if storage.is_url(folder.name):
        return folder.name.rpartition("/")[0]
    return str(Path(folder.name).absolute().parent)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
