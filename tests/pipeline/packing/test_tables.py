"""Tables of images: the columns and rows that are used, and the refusal of unusable tables."""

import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.packing.sources.find import SourceImage, find_sources
from tests.trees import assert_refused


def write_text(path: Path, columns: dict[str, list]) -> None:
    between = "\t" if path.suffix == ".tsv" else ","
    rows = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(between.join(map(str, row)) + "\n" for row in rows))


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


WRITERS = {".csv": write_text, ".tsv": write_text, ".parquet": write_parquet}
every_kind = pytest.mark.parametrize(("suffix", "write"), WRITERS.items(), ids=WRITERS)
COLUMNS = {
    "width": [1, 2, 3, 4],
    "label": ["b", "a", "b", "a"],
    "path": ["2.jpg", "/mnt/1.jpg", "s3://bucket/x/3.jpg", "deep/4.jpg"],
    "split": ["train", "train", "val", "val"],
}


@every_kind
def test_paths_are_relative_absolute_or_urls_and_other_columns_are_ignored(tmp_path, suffix, write):
    path = tmp_path / f"images{suffix}"
    write(path, COLUMNS)
    sources = find_sources(path, None, 0)
    assert sources.classes == ["a", "b"]
    assert sources.splits == {
        "train": [SourceImage("/mnt/1.jpg", 0, "/mnt/1.jpg"), SourceImage("2.jpg", 1, f"{tmp_path}/2.jpg")],
        "val": [
            SourceImage("deep/4.jpg", 0, f"{tmp_path}/deep/4.jpg"),
            SourceImage("s3://bucket/x/3.jpg", 1, "s3://bucket/x/3.jpg"),
        ],
    }


@every_kind
def test_without_a_column_split_a_fraction_of_each_class_is_held_out(tmp_path, suffix, write):
    path = tmp_path / f"images{suffix}"
    write(path, {"path": [f"{n}.jpg" for n in range(20)], "label": [n % 2 for n in range(20)]})
    sources = find_sources(path, 0.2, 0)
    assert sources.classes == ["0", "1"]
    assert [source.label for source in sources.splits["val"]] == [0, 0, 1, 1]
    assert len(sources.splits["train"]) == 16


def test_quotes_and_a_byte_order_mark_are_not_part_of_a_name(tmp_path):
    path = tmp_path / "images.CSV"
    path.write_bytes('\ufeffpath,label,split\r\n"a, b.jpg","x",train\r\nçà.jpg,x,val\r\n'.encode())
    splits = find_sources(path, None, 0).splits
    assert [split[0].path for split in splits.values()] == ["a, b.jpg", "çà.jpg"]


def without(*names: str) -> dict[str, list]:
    return {name: values for name, values in COLUMNS.items() if name not in names}


ERRORS = {
    "no path": (without("path"), None, "has no column path; its columns are: width, label, split"),
    "neither column": (without("path", "label"), None, "has no column path and no column label; its col"),
    "no split": (without("split"), None, "has no column split .* --val-fraction 0.1"),
    "val and a fraction": (COLUMNS, 0.1, "already has rows for the split 'val': omit --val-fraction"),
    "an unknown split": (COLUMNS | {"split": ["train", "val", "part3", "val"]}, None, r"row \d: .*'part3'"),
    "an empty path": (COLUMNS | {"path": ["1", "", "3", "4"]}, None, r"row \d: expected a path"),
    "a path with a zero byte": (COLUMNS | {"path": ["1", "2\0", "3", "4"]}, None, r"row \d: expected a path"),
    "an empty label": (COLUMNS | {"label": ["a", "", "a", "a"]}, None, r"row \d: expected a path, a label"),
    "a path twice": (COLUMNS | {"path": ["1", "2", "1", "4"]}, None, r"row \d: 1 is already in row \d"),
    "a class of val alone": (
        COLUMNS | {"label": ["a", "a", "a", "c"]},
        None,
        r"\(rows of val\) has classes that are not in .* \(rows of train\): c\.",
    ),
    "no val": (COLUMNS | {"split": ["train"] * 4}, None, "no column split with rows for val"),
    "no train": (COLUMNS | {"split": ["val"] * 4}, None, "no rows for the split 'train'"),
    "control characters": (COLUMNS | {"label": ["a", "b\a", "a", "a"]}, None, "control characters"),
}


@every_kind
@pytest.mark.parametrize(("columns", "fraction", "message"), ERRORS.values(), ids=ERRORS)
def test_tables_that_cannot_be_packed_are_refused(tmp_path, suffix, write, columns, fraction, message):
    path = tmp_path / f"images{suffix}"
    write(path, columns)
    assert_refused(path, message, fraction)


BROKEN = {
    "absent.csv": (None, "cannot be read: .*No such file"),
    "absent.parquet": (None, "cannot be read: .*No such file"),
    "empty.csv": (b"", "no column path and no column label; its columns are: none"),
    "latin.csv": (b"path,label,split\n\xe9,a,train\n", "is not a valid table"),
    "short.tsv": (b"path\tlabel\tsplit\n1\ta\n", "row 2: expected a path"),
    "twice.csv": (b"path,label,path,split\n1,a,2,train\n", "more than one column named path"),
    "text.parquet": (b"path,label\n", "is not a valid Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, message)


def test_parquet_paths_that_are_not_text_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", COLUMNS | {"path": [1, 2, 3, 4]})
    assert_refused(tmp_path / "a.parquet", "row 1: expected a path")


@pytest.mark.parametrize("column", ["path", "label"])
def test_parquet_text_that_is_not_utf8_is_refused(tmp_path, column):
    table = pyarrow.table(COLUMNS)
    latin = pyarrow.array([b"\xe9"] + [b"a"] * 3).view(pyarrow.string())
    table = table.set_column(table.column_names.index(column), column, latin)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert_refused(tmp_path / "a.parquet", "is not a valid Parquet file: .*utf-8")


@pytest.mark.parametrize("value", ['{"info": {"features": null}}', '{"info": {"features": [1]}}', "[]", "{"])
def test_other_descriptions_than_hugging_faces_are_ignored(tmp_path, value):
    table = pyarrow.table(COLUMNS).replace_schema_metadata({"huggingface": value})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert find_sources(tmp_path / "a.parquet", None, 0).classes == ["a", "b"]


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", COLUMNS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(tmp_path / "a.parquet", r"alexnet-train\[parquet\].*CSV")
