"""Class names that look alike but differ: é as one character, and as e with a combining accent (macOS)."""

import unicodedata
from pathlib import Path

import pytest

from pipeline.packing.sources.find import SourceError, find_sources
from tests.trees import touch

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def tree(root: Path, train: list[str], val: list[str]) -> Path:
    return touch(root, *(f"train/{name}/1.jpg" for name in train), *(f"val/{name}/1.jpg" for name in val))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ([COMPOSED, DECOMPOSED], [COMPOSED]),
        ([COMPOSED], [DECOMPOSED]),
        ([DECOMPOSED], [COMPOSED]),
        (["a", COMPOSED], ["a", DECOMPOSED]),
        (["Å"], ["\N{ANGSTROM SIGN}"]),
    ],
)
def test_classes_that_look_alike_are_refused_with_the_reason(tmp_path, train, val):
    with pytest.raises(SourceError, match=r"look alike.*\(NFC, and NFD.*rename one") as error:
        find_sources(tree(tmp_path, train, val), None, 0)
    assert str(error.value).count("\\") >= 1  # the escape sequences that distinguish them


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
def test_either_form_alone_is_accepted(tmp_path, name):
    assert find_sources(tree(tmp_path, [name], [name]), None, 0).classes == [name]


def test_classes_that_merely_differ_are_not_said_to_look_alike(tmp_path):
    with pytest.raises(SourceError, match=r"/val has classes that are not in .*/train: b\."):
        find_sources(tree(tmp_path, ["a"], ["b"]), None, 0)


def test_class_names_in_the_other_form_are_refused(tmp_path):
    source = tree(tmp_path / "in", [COMPOSED], [COMPOSED])
    (tmp_path / "names.txt").write_text(f"{DECOMPOSED} coffee\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"--class-names .*names.txt .*look alike"):
        find_sources(source, None, 0, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text(f"{COMPOSED} coffee\n", encoding="utf-8")
    assert find_sources(source, None, 0, tmp_path / "names.txt").names == {COMPOSED: "coffee"}
