"""The files that are packed, with their splits, labels and names."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing.sources.find import SourceImage, Sources, find_sources
from tests.trees import assert_refused, touch


def paths_of(sources: Sources, split: str) -> list[str]:
    return [source.path for source in sources.splits[split]]


def test_class_folders_are_sorted_by_class_and_file(tmp_path):
    expected = {
        "train": [("train/n01/c.JPEG", 0), ("train/n02/a.JPEG", 1), ("train/n02/b.JPEG", 1)],
        "val": [("val/n01/d.JPEG", 0), ("val/n02/e.JPEG", 1)],
    }
    touch(tmp_path, *(path for files in expected.values() for path, _ in reversed(files)))
    sources = find_sources(tmp_path, None, 0)
    assert sources.classes == ["n01", "n02"]
    assert sources.splits == {
        split: [SourceImage(path, label, f"{tmp_path}/{path}") for path, label in files]
        for split, files in expected.items()
    }
    assert sources.strays == []


def test_every_file_below_a_class_folder_belongs_to_the_class(tmp_path):
    touch(tmp_path, "train/a/images/deep/1", "train/a/no jpg.txt", "val/a/2.png")
    sources = find_sources(tmp_path, None, 0)
    assert paths_of(sources, "train") == ["train/a/images/deep/1", "train/a/no jpg.txt"]


def test_links_are_followed_and_dangling_links_are_kept_for_the_report(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "in/train/a/2.jpg", "in/val/a/3.jpg")
    (tmp_path / "in/train/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/train/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/train/a/gone.jpg").symlink_to(tmp_path / "nothing")
    sources = find_sources(tmp_path / "in", None, 0)
    assert sources.classes == ["a", "b"]
    expected = ["train/a/2.jpg", "train/a/gone.jpg", "train/a/more/1.jpg", "train/b/1.jpg"]
    assert paths_of(sources, "train") == expected


def test_files_outside_class_folders_are_listed_as_strays(tmp_path):
    touch(tmp_path, "train/readme", "train/a/1.jpg", "val/a/1.jpg", "val/labels.txt")
    assert find_sources(tmp_path, None, 0).strays == ["train/readme", "val/labels.txt"]
    touch(tmp_path / "flat", "a/1.jpg", "a/2.jpg", "notes")
    assert find_sources(tmp_path / "flat", 0.5, 0).strays == ["notes"]


def flat_folders(root: Path, *counts: int) -> Path:
    """Create class folders without splits, with so many files in each."""
    return touch(root, *(f"class{label}/{n:03d}" for label, count in enumerate(counts) for n in range(count)))


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    fraction=st.floats(0.3, 0.7),
    seed=st.integers(0, 2**63),
)
def test_class_folders_without_splits_are_split_class_by_class(tmp_path_factory, counts, fraction, seed):
    root = flat_folders(tmp_path_factory.mktemp("flat"), *counts)
    splits = find_sources(root, fraction, seed).splits
    assert list(splits) == ["train", "val"]
    for split in splits.values():
        assert split == sorted(split, key=lambda source: source.path)
    everything = sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))
    assert sorted(source.path for split in splits.values() for source in split) == everything  # each once
    for label, count in enumerate(counts):
        held = sum(source.label == label for source in splits["val"])
        assert abs(held - count * fraction) <= 0.5
        assert all(source.path.startswith(f"class{source.label}/") for source in splits["val"])
    assert find_sources(root, fraction, seed).splits == splits


def test_the_last_image_of_a_class_is_not_held_out(tmp_path):
    splits = find_sources(flat_folders(tmp_path, 1, 5), 0.9, 0).splits
    assert [source.label for source in splits["train"]] == [0, 1]


def test_the_seed_decides_what_is_held_out(tmp_path):
    flat_folders(tmp_path, 40, 40)
    held = {tuple(paths_of(find_sources(tmp_path, 0.25, seed), "val")) for seed in range(5)}
    assert len(held) == 5
    assert {len(each) for each in held} == {20}


ERRORS = {
    "no folder": ([], None, "missing", "does not exist"),
    "a file": (["missing"], None, "missing", "is neither a folder nor a table"),
    "only train": (["train/a/1.jpg"], None, "", "has train, but no folder is named val"),
    "val, and a fraction": (["train/a/1.jpg", "val/a/1.jpg"], 0.1, "", "omit --val-fraction"),
    "neither train nor val": (["a/1.jpg", "b/1.jpg"], None, "", "--val-fraction 0.1 to hold out"),
    "no classes": (["train/1.jpg", "val/1.jpg"], None, "", "no class folders"),
    "no classes in a flat folder": (["1.jpg"], 0.1, "", "no class folders"),
    "classes without a file": (["train/a/", "val/a/1.jpg"], None, "", "no files for the split 'train'"),
    "nothing to validate on": (["train/a/1.jpg", "val/"], None, "", "no files for the split 'val'"),
    "too few to hold one out": (
        ["a/1.jpg", "b/1.jpg"],
        0.1,
        "",
        "0.1 holds out no image .*: add images, or use a larger",
    ),
    "a class of val alone": (
        ["train/a/1", "val/a/1", "val/b/1"],
        None,
        "",
        "val has classes that are not in .*train: b",
    ),
    "a class without training files": (["train/a/1", "train/b/", "val/a/1", "val/b/1"], None, "", r"\bb\b"),
}


@pytest.mark.parametrize(("paths", "fraction", "root", "message"), ERRORS.values(), ids=ERRORS)
def test_folders_that_cannot_be_packed_are_refused_with_the_reason(tmp_path, paths, fraction, root, message):
    touch(tmp_path, *paths)
    assert_refused(tmp_path / root, message, fraction)


def test_a_folder_linked_into_itself_is_walked_once(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    (tmp_path / "train/a/loop").symlink_to(".")
    assert paths_of(find_sources(tmp_path, None, 0), "train") == ["train/a/1.jpg"]


def test_a_class_name_that_is_not_text_is_refused(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    Path(os.fsdecode(bytes(tmp_path) + b"/train/\xff")).mkdir()
    assert_refused(tmp_path, "control characters")


def test_a_relative_input_gives_files_that_any_working_directory_finds(tmp_path, monkeypatch):
    touch(tmp_path, "in/train/a/1.jpg", "in/val/a/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_sources("in", None, 0) == find_sources(tmp_path / "in", None, 0)


def test_class_folders_are_sorted_by_their_names_alone(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a-b/1.jpg", "val/a/1.jpg")  # "-" sorts before "/"
    assert [source.label for source in find_sources(tmp_path, None, 0).splits["train"]] == [0, 1]


def test_numeric_classes_are_sorted_as_numbers(tmp_path):
    names = ["0", "1", "2", "9", "10", "100"]
    touch(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in names))
    sources = find_sources(tmp_path, None, 0)
    assert sources.classes == names
    assert paths_of(sources, "val") == [f"val/{name}/1.jpg" for name in names]


@pytest.mark.parametrize("names", [["10", "2", "a"], ["1.5", "10", "2"], ["-1", "10", "2"], ["10", "2", "²"]])
def test_all_classes_are_sorted_as_text_if_one_is_not_a_number(tmp_path, names):
    touch(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in names))
    assert find_sources(tmp_path, None, 0).classes == names
