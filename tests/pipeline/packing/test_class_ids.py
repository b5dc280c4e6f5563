"""The class ids that labels stand for, the ids that are refused, and the readable names of classes."""

import csv
import decimal
import io
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.messages import join_names, pluralize
from pipeline.packing.sources.class_ids import (
    check_printable,
    class_id,
    confusable_pairs,
    sort_classes,
    without_fractions,
)
from pipeline.packing.sources.class_names import read_class_names
from pipeline.packing.sources.find import Sources, find_sources
from pipeline.packing.sources.listing import SourceError
from tests.trees import write

NAN = float("nan")
LABELS = {
    "cat": "cat",
    " cat": "cat",
    "cat\t": "cat",
    "\N{IDEOGRAPHIC SPACE}cat\N{NO-BREAK SPACE}": "cat",
    "golden retriever": "golden retriever",
    "08": "08",
    8: "8",
    9.0: "9",
    -1: "-1",
    1.5: "1.5",
    decimal.Decimal("10.00"): "10",
    2**70: str(2**70),
    "": None,
    "  ": None,
    "nan": None,
    " NaN ": None,
    "NaT": None,
    "None": None,
    "<NA>": None,
    "none": "none",
    "Nan": "Nan",
    float("inf"): None,
    decimal.Decimal("NaN"): None,
}


@pytest.mark.parametrize(("label", "expected"), [*LABELS.items(), (True, "True"), (NAN, None), (None, None)])
def test_a_label_stands_for_a_class_id_or_for_none(label, expected):
    assert class_id(label) == expected


@pytest.mark.parametrize("label", [b"cat", ["cat"], {"a": 1}, ("cat",), object()])
def test_values_of_other_types_are_not_labels(label):
    assert class_id(label) is None


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_whole_numbers_are_the_same_classes_whatever_their_type(numbers):
    texts = [str(number) for number in numbers]
    assert [class_id(number) for number in numbers] == texts
    assert [class_id(float(number)) for number in numbers] == texts
    assert list(without_fractions([f"{number}.0" for number in numbers])) == texts


@pytest.mark.parametrize("ids", [["1.0", "a"], ["1.5", "2.0"], ["v1.0"], ["1.0.0"], ["-1.0", "2.0"]])
def test_ids_that_are_not_all_whole_numbers_stay_unchanged(ids):
    assert without_fractions(ids) == ids


def table(path: Path, labels: list, splits: tuple[str, str] = ("train", "val")) -> Path:
    """Write a table of the labels, which occur once in each split."""
    rows = [(f"{split}{n}.jpg", label, split) for split in splits for n, label in enumerate(labels)]
    columns = dict(zip(("path", "label", "split"), map(list, zip(*rows, strict=True)), strict=True))
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
    else:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([columns, *rows])
        write(path, buffer.getvalue())
    return path


def found(path: Path, labels: list) -> Sources:
    return find_sources(table(path, labels), None, 0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("labels", [[8.0, 10.0], [8, 10], ["8.0", "10.0"], ["8", "10.0"]])
def test_classes_are_in_numerical_order_even_in_floating_point(tmp_path, suffix, labels):
    sources = found(tmp_path / f"t{suffix}", labels)
    assert sources.classes == ["8", "10"]
    assert [source.label for source in sources.splits["val"]] == [0, 1]


def test_white_space_around_labels_is_ignored(tmp_path):
    assert found(tmp_path / "t.csv", ["cat", " cat", "cat ", "dog\t"]).classes == ["cat", "dog"]
    write(tmp_path / "t.csv", "path, label, split\n1.jpg, cat, train\n2.jpg,  cat,  val\n")
    sources = find_sources(tmp_path / "t.csv", None, 0)
    assert (sources.classes, sources.splits["val"][0].file) == (["cat"], f"{tmp_path}/2.jpg")


def test_booleans_and_categories_are_labels(tmp_path):
    assert found(tmp_path / "t.parquet", [True, False]).classes == ["False", "True"]
    labels = pyarrow.array(["b", "b", "a", "a"]).dictionary_encode()
    columns = {"path": ["1", "2", "3", "4"], "label": labels, "split": ["train", "val"] * 2}
    parquet.write_table(pyarrow.table(columns), tmp_path / "c.parquet")
    assert find_sources(tmp_path / "c.parquet", None, 0).classes == ["a", "b"]


MISSING = {
    "NaN of Parquet": (".parquet", [1.0, NAN], "nan"),
    "null of Parquet": (".parquet", ["a", None], "None"),
    "empty of CSV": (".csv", ["a", ""], "''"),
    "blank of CSV": (".csv", ["a", "  "], "''|'  '"),
    "nan of CSV": (".csv", ["1.0", "nan"], "nan"),
    "None of CSV": (".csv", ["a", "None"], "None"),
    "NaT of CSV": (".csv", ["a", "NaT"], "NaT"),
    "a list": (".parquet", [["a"], ["b"]], r"\['a'\]"),
}


@pytest.mark.parametrize(("suffix", "labels", "label"), MISSING.values(), ids=MISSING)
def test_a_missing_label_is_refused_by_its_row(tmp_path, suffix, labels, label):
    with pytest.raises(SourceError, match=rf"row \d: expected a path, a label .*{label}"):
        found(tmp_path / f"t{suffix}", labels)


PRINTABLE = [
    "می\N{ZERO WIDTH NON-JOINER}خواهم",
    "क्\N{ZERO WIDTH JOINER}ष",
    "日\N{IDEOGRAPHIC SPACE}本",
    "cat",
    "🐈",
    "ﻻ",
]
PRINTABLE += [
    "a\N{NO-BREAK SPACE}b",
    "שלום\N{RIGHT-TO-LEFT MARK}",
    "soft\N{SOFT HYPHEN}ly",
    "👩\N{ZERO WIDTH JOINER}🚀",
]
NOT_PRINTABLE = ["a\nb", "a\tb", "a\x07", "\x1b[31mred", "a\x85b", "a\u2028b", "a\u2029b", "a\x00", "a\udcff"]


@pytest.mark.parametrize("name", PRINTABLE)
def test_class_ids_may_have_the_characters_that_scripts_need(tmp_path, name):
    assert found(tmp_path / "t.csv", [name, "other"]).classes == sorted([name, "other"])


@pytest.mark.parametrize("name", NOT_PRINTABLE)
def test_class_ids_with_control_characters_or_line_breaks_are_refused(name):
    with pytest.raises(SourceError, match="control characters") as refusal:
        check_printable(["other", name], "a table")
    assert str(refusal.value).isprintable()


def test_a_message_about_many_class_ids_is_short(tmp_path):
    with pytest.raises(SourceError, match="and 19,995 more") as refusal:
        found(tmp_path / "t.parquet", [f"a\x07{number}" for number in range(20_000)])
    assert len(str(refusal.value)) < 400


def test_messages_list_at_most_five_names():
    assert join_names(["a", "b"]) == "a, b"
    assert join_names(list("abcdef")) == "a, b, c, d, e and 1 more"


@pytest.mark.parametrize(("number", "phrase"), [(0, "0 classes"), (1, "1 class"), (1234, "1,234 classes")])
def test_a_noun_agrees_with_its_number(number, phrase):
    assert pluralize(number, "class", "classes") == phrase


def test_numbers_are_sorted_by_value_and_others_alphabetically():
    assert sort_classes(["10", "9", "1"]) == ["1", "9", "10"]
    assert sort_classes(["10", "9", "a"]) == ["10", "9", "a"]


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("a b", "a  b"), ("ab", "a\N{ZERO WIDTH SPACE}b"), ("ﬁn", "fin")]
)
def test_a_warning_names_classes_that_are_easily_confused(tmp_path, pair):
    assert confusable_pairs(pair) == [pair]
    (warning,) = found(tmp_path / "t.csv", list(pair)).warnings
    assert "differ only in" in warning


def test_classes_that_differ_visibly_are_not_confusable():
    assert confusable_pairs(["cat", "cats", "c at"]) == []


# Readable names of classes.

FILES = {
    "white space": "cat a cat\ndog a dog\n",
    "tabs": "cat\ta cat\ndog\ta dog\t7\n",
    "commas": "cat,a cat\ndog,a dog\n",
    "commas and blanks": "cat, a cat\ndog, a dog\n",
    "quotes": '"cat","a cat"\r\n"dog","a dog"\r\n',
    "semicolons": "cat;a cat\ndog;a dog\n",
    "a heading": "id,name\ncat,a cat\ndog,a dog\n",
    "more columns": "cat,a cat,1\ndog,a dog,2\n",
    "a byte order mark": "\ufeffcat a cat\ndog a dog\n",
    "UTF-16": "cat a cat\ndog a dog\n".encode("utf-16"),
    "old line ends": "cat a cat\rdog a dog\r",
    "empty lines and blanks": "\n  cat a cat\n\n dog  a dog \n\n",
    "another order and more classes": "cow a cow\ndog a dog\ncat a cat\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_names_are_taken_from_each_kind_of_file(tmp_path, content):
    write(tmp_path / "names", content)
    table(tmp_path / "t.csv", ["cat", "dog"])
    sources = find_sources(tmp_path / "t.csv", None, 0, tmp_path / "names")
    assert [sources.names[each] for each in sources.classes] == ["a cat", "a dog"]
    assert sources.warnings == []


def test_class_ids_may_contain_the_separator_of_id_and_name(tmp_path):
    write(tmp_path / "names", '"golden retriever",a dog\n"a, b",both\n')
    assert read_class_names(tmp_path / "names", ["golden retriever", "a, b"]) == {
        "golden retriever": "a dog",
        "a, b": "both",
    }


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ("n01 a cat\nn02 a dog\n", "cat, dog"),
        ("cat a cat\n", "dog"),
        ("", "cat, dog"),
        ("cat\ndog\n", "cat, dog"),
    ],
)
def test_a_warning_lists_the_classes_without_a_name(tmp_path, content, missing):
    write(tmp_path / "names", content)
    table(tmp_path / "t.csv", ["cat", "dog"])
    sources = find_sources(tmp_path / "t.csv", None, 0, tmp_path / "names")
    assert sources.warnings == [f"--class-names {tmp_path}/names has no name for the classes {missing}"]
