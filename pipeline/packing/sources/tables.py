"""Read a table of images: CSV, TSV or Parquet with the columns path, label and, optionally, split.

A path is absolute, a URL, or relative to the table's own folder. A label is a class id. A split is `train`,
`val` or another name for one of them (splits.py); rows of `test` are not used. Other columns are ignored. A
Parquet file may also contain the images: see parquet.py.
"""

import csv
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Any

from pipeline.files import path_in_errors
from pipeline.locations import is_url
from pipeline.messages import pluralize
from pipeline.packing.sources.class_ids import class_id, without_fractions
from pipeline.packing.sources.listing import LabelledImage, SourceError, SplitFiles
from pipeline.packing.sources.parquet import has_images, is_parquet, opened_parquet, parquet_images
from pipeline.packing.sources.splits import split_of
from pipeline.storage import open_file

_SUFFIXES = (".csv", ".tsv", ".parquet")


def is_table(name: str) -> bool:
    """Return whether a path or URL has the name of a table."""
    return name.lower().endswith(_SUFFIXES)


def read_table(
    name: str, val_fraction: float | None
) -> tuple[dict[str, SplitFiles], Callable[[], dict[str, str]]]:
    """Read the splits of a table; return them and a function that returns names of classes by class id.

    name: an absolute path or a URL. With val_fraction there is only train, from which val is still to be held
    out. Raises SourceError if the table is not valid, and OSError.
    """
    folder, _, file = name.rpartition("/")
    if is_parquet(name) and has_images(name):
        splits, names = parquet_images(folder, [file], val_fraction)
        return splits, lambda: names
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in ("train", "val", "test")}
    seen: dict[str, int] = {}
    read = _parquet_rows if is_parquet(name) else _text_rows
    with path_in_errors(name):
        for number, (path, label, *rest) in read(name):
            split, found = split_of(str(rest[0])) if rest else "train", class_id(label)
            if split is None or not _is_path(path) or (not found and split != "test"):
                raise SourceError(
                    f"{name}, row {number}: expected a path, a label and, in the column split, train or val, "
                    f"but found {(path, label, *rest)}"
                )
            if seen.setdefault(path, number) != number:
                raise SourceError(f"{name}, row {number}: {path} is already in row {seen[path]}")
            rows[split].append((path, found or ""))
    test = rows.pop("test")
    if not rows["train"]:
        raise SourceError(f"{name} has no rows for the split 'train'")
    if rows["val"] and val_fraction is not None:
        raise SourceError(f"{name} already has rows for the split 'val': omit --val-fraction")
    if not rows["val"] and val_fraction is None:
        raise SourceError(
            f"{name} has no column split with rows for val: add them, or hold out a tenth of each class for "
            "validation with --val-fraction 0.1"
        )
    ids = iter(without_fractions([found for part in rows.values() for _, found in part]))
    parts = {}
    for split, part in rows.items():
        images = [LabelledImage(path, next(ids), _locate(path, folder)) for path, _ in part]
        classes = sorted({image.class_id for image in images})
        if split == "train" or images:
            parts[split] = SplitFiles(f"{name} (rows of {split})", classes, images)
    if test:
        parts["train"].unused.append(f"the split test ({pluralize(len(test), 'row', 'rows')})")
    return parts, dict


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _locate(path: str, folder: str) -> str:
    return path if is_url(path) or path.startswith("/") else f"{folder}/{path}"


def _columns(name: str, found: list[str]) -> list[str]:
    """Return the names of the columns to read. Raises SourceError if they are not as expected."""
    missing = [column for column in ("path", "label") if column not in found]
    if missing:
        raise SourceError(
            f"{name} has no column {' and no column '.join(missing)}; its columns are: "
            f"{', '.join(found) or 'none'}"
        )
    for column in ("path", "label", "split"):
        if found.count(column) > 1:
            raise SourceError(f"{name} has more than one column named {column}")
    return ["path", "label"] + ["split"] * ("split" in found)


Rows = Iterator[tuple[int, tuple[Any, ...]]]  # row numbers, for messages, and rows


def _text_rows(name: str) -> Rows:
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    try:
        with open_file(name) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
            reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            columns = _columns(name, list(reader.fieldnames))
            for row in reader:
                yield reader.line_num, tuple(row[column] for column in columns)
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{name} is not a valid table: {error}") from None


def _parquet_rows(name: str) -> Rows:
    with opened_parquet(name) as table:
        columns = _columns(name, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in zip(*(batch[column].to_pylist() for column in columns), strict=True):
                number += 1
                yield number, row
