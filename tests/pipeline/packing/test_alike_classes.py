"""Classes whose names look the same and are not: é as one character, and as e with an accent (macOS)."""

import unicodedata
from pathlib import Path

import pytest

from pipeline.packing.sources.find import SourceError, find_sources

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def tree(root: Path, train: list[str], val: list[str]) -> Path:
    for split, names in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.jpg").touch()
    return root


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
def test_they_are_refused_with_the_reason(tmp_path, train, val):
    with pytest.raises(SourceError, match=r"look alike.*\(NFC, and NFD.*rename one") as error:
        find_sources(tree(tmp_path, train, val), None, 0)
    assert str(error.value).count("\\") >= 1  # by which they can be told apart


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
def test_one_of_them_is_as_good_as_the_other(tmp_path, name):
    assert find_sources(tree(tmp_path, [name], [name]), None, 0).classes == [name]


def test_other_classes_that_differ_are_none_of_these(tmp_path):
    with pytest.raises(SourceError, match=r"the class b is in .* but not in"):
        find_sources(tree(tmp_path, ["a"], ["b"]), None, 0)


def test_class_names_in_the_other_form_are_refused(tmp_path):
    source = tree(tmp_path / "in", [COMPOSED], [COMPOSED])
    (tmp_path / "names.txt").write_text(f"{DECOMPOSED} coffee\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"--class-names .*names.txt .*look alike"):
        find_sources(source, None, 0, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text(f"{COMPOSED} coffee\n", encoding="utf-8")
    assert find_sources(source, None, 0, tmp_path / "names.txt").names == {COMPOSED: "coffee"}
