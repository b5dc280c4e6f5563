"""Find the images inside Parquet files, the form in which Hugging Face distributes datasets.

    data/train-00000-of-00294.parquet, …, data/validation-00000-of-00014.parquet, …

Words in a file's path name its split, as in WebDataset tars; files of test are not used. A row has an image
(a struct of `bytes` and `path`) and a label. The schema's metadata says which columns these are, and the
names of the classes; without it, the columns are `image` and `label`. A label is a number or a text, which is
the class id.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from pipeline.files import path_in_errors
from pipeline.packing.sources.class_ids import class_id
from pipeline.packing.sources.listing import InputFolder, LabelledImage, SourceError, SplitFiles
from pipeline.packing.sources.splits import by_split, check_splits
from pipeline.retry import is_of_storage
from pipeline.storage import open_file

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

_BATCH = 64  # rows that are in memory at a time
_BUFFER = 1 << 20  # bytes that are read at a time


class _Columns(NamedTuple):
    """image: name of the column of structs. label: name of the column of labels. names: of the classes."""

    image: str
    label: str
    names: list[str]


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def find_parquet(folder: InputFolder) -> list[str]:
    """Return all Parquet files at any depth in a folder."""
    return [name for name in folder.files("") if is_parquet(name)]


def parquet_images(
    location: str, files: Sequence[str], val_fraction: float | None
) -> tuple[dict[str, SplitFiles], dict[str, str]]:
    """Return the images of each split and the names of classes by class id.

    location: the folder of the files. With val_fraction there is only train, from which val is still to be
    held out. Raises SourceError if a row has no label, or if the files do not agree about the classes.
    """
    splits, unnamed = by_split(location, files)
    check_splits(location, splits, "Parquet file", val_fraction)
    test = splits.pop("test")
    if val_fraction is not None:
        del splits["val"]
    found: dict[str, SplitFiles] = {}
    names: dict[str, list[str]] = {}
    for split, members in splits.items():
        images: list[LabelledImage] = []
        paths = [f"{location}/{name}" for name in members]
        for path in paths:
            names[path], in_file = _read(path, split)
            images += in_file
        classes = list(dict.fromkeys(image.class_id for image in images))
        strays, unused = (unnamed, test) if split == "train" else ([], [])
        found[split] = SplitFiles(f"{location} ({split})", classes, images, strays, frozenset(paths), unused)
    first, *others = names
    for path in others:
        if names[path] != names[first]:
            raise SourceError(f"{path} and {first} have different names of classes")
    return found, {str(number): name for number, name in enumerate(names[first])}


def has_images(file: str) -> bool:
    """Return whether a Parquet file contains images, not only paths. Raises SourceError or OSError."""
    with opened_parquet(file) as table:
        return _image_column(table.schema_arrow) is not None


def images_of(file: str) -> Iterator[bytes]:
    """Yield the images of a Parquet file by row; one that is missing is empty. Raises SourceError or OSError.

    A page of the column, which has 1,024 rows or fewer as pyarrow writes it, is in memory at a time, whatever
    the size of the row groups.
    """
    with opened_parquet(file) as table:
        column = _columns(table.schema_arrow, file).image
        for batch in table.iter_batches(_BATCH, columns=[f"{column}.bytes"]):
            for content in batch[column].field("bytes"):
                yield content.as_py() or b""


def _read(file: str, split: str) -> tuple[list[str], list[LabelledImage]]:
    """Return the names of classes and the images, without reading these; an image's offset is its row."""
    stem = file.rpartition("/")[2].removesuffix(".parquet")
    images: list[LabelledImage] = []
    with opened_parquet(file) as table:
        columns = _columns(table.schema_arrow, file)
        leaves = [f"{columns.image}.path", columns.label]
        for batch in table.iter_batches(columns=leaves):
            paths = batch[columns.image].field("path").to_pylist()
            for path, label in zip(paths, batch[columns.label].to_pylist(), strict=True):
                row = len(images)
                name = class_id(label)
                if name is None or (isinstance(label, int | float) and name.startswith("-")):
                    raise SourceError(f"{file}, row {row + 1} has no label, but {label!r}")
                if columns.names and not (isinstance(label, int | float) and label < len(columns.names)):
                    raise SourceError(
                        f"{file}, row {row + 1} has the label {label}, but there are only "
                        f"{len(columns.names)} names of classes"
                    )
                images.append(LabelledImage(f"{split}/{name}/{path or f'{stem}-{row:06d}'}", name, file, row))
    return columns.names, images


def _columns(schema: "Schema", file: str) -> _Columns:
    """Find the columns of the images and of the labels. Raises SourceError if there is not one of each."""
    image = _image_column(schema)
    if image is None:
        raise SourceError(
            f"{file} has no column of images (a struct of bytes and path); its columns are: "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(image).type.field("bytes").type
    if "binary" not in str(kind):
        raise SourceError(f"{file}: the bytes in column {image} are of type {kind}, not binary")
    labels = {
        name: each.get("names") or []
        for name, each in _features(schema).items()
        if each["_type"] == "ClassLabel"
    }
    for name, names in labels.items():
        if not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
            raise SourceError(f"{file}: the names of classes of column {name} are not a list of strings")
    if "label" in schema.names:
        label = "label"
    elif len(labels) == 1:
        label = next(iter(labels))
    else:
        raise SourceError(
            f"{file} has no column named label; its columns are: {', '.join(schema.names)}. Rename the one "
            "that has the labels"
        )
    return _Columns(image, label, labels.get(label, []))


def _image_column(schema: "Schema") -> str | None:
    """Return the first column that is a struct of bytes and path."""
    for field in schema:
        children = [field.type.field(n).name for n in range(field.type.num_fields)]
        if {"bytes", "path"} <= set(children):
            return field.name
    return None


def _features(schema: "Schema") -> dict[str, dict]:
    """Return Hugging Face's description of the columns that have a type of their own, if there is one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict) and "_type" in each}
    except (TypeError, KeyError, ValueError, AttributeError):  # no metadata, or other metadata
        return {}


@contextmanager
def opened_parquet(file: str) -> Iterator["ParquetFile"]:
    """Open a Parquet file.

    Raises SourceError if it is damaged, or if pyarrow is not installed, and OSError.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SourceError(
            f"reading {file} needs pyarrow: run pip install 'alexnet-train[parquet]', or use a CSV table"
        ) from None
    with path_in_errors(file), open_file(file) as opened:
        try:
            yield parquet.ParquetFile(opened, buffer_size=_BUFFER, pre_buffer=False)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            if is_of_storage(error):
                raise
            raise SourceError(f"{file} is not a valid Parquet file: {error}") from None
