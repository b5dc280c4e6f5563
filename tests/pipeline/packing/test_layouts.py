"""Layouts of input folders: the names by which splits are recognised, and the advice if one is missing."""

import io
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pipeline.manifest import read_manifest
from pipeline.packing.progress import Progress
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.packing.sources.splits import split_folders, split_of
from tests.trees import assert_refused, pack_here, tar_of, write
from tools import make_shards

SPLITS = [
    ("train", "val"),
    ("Train", "Val"),
    ("TRAIN", "VALID"),
    ("training", "validation"),
    ("Training", "Valid"),
    ("train", "dev"),
    ("training_set", "validation_set"),
    ("train2017", "val2017"),
    ("trainset", "valset"),
    ("train-images", "val-images"),
]
every_naming = pytest.mark.parametrize(("train", "val"), SPLITS)


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (seed * 40 % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def folders(root: Path, *splits: str, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Path:
    for split in splits:
        for name in classes:
            for number in range(count):
                write(root / split / name / f"{number}.jpg", image(number))
    return root


@every_naming
def test_splits_are_known_by_their_names_in_folders(tmp_path, train, val):
    found = find_sources(folders(tmp_path, train, val), None, 0)
    assert found.classes == ["cat", "dog"]
    assert {split: len(images) for split, images in found.splits.items()} == {"train": 8, "val": 8}
    assert found.splits["train"][0].path == "train/cat/0.jpg"  # so the names do not change the shards


@pytest.mark.parametrize(("train", "val"), [each for each in SPLITS if "set" not in each[0]][:6])
def test_splits_are_known_by_their_names_in_tars_parquet_files_and_tables(tmp_path, train, val):
    rows = {"image": [{"bytes": image(0), "path": None}], "label": [0]}
    for split in (train, val):
        write(tmp_path / f"tars/{split}-0.tar", tar_of({"1.jpg": b"", "1.cls": b"0"}))
        (tmp_path / "parquet").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(rows), tmp_path / f"parquet/{split}-0.parquet")
    write(tmp_path / "table.csv", f"path,label,split\n1.jpg,a,{train}\n2.jpg,a, {val}\n")
    for source in ("tars", "parquet", "table.csv"):
        splits = find_sources(tmp_path / source, None, 0).splits
        assert {split: len(images) for split, images in splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    "name", ["trains", "train station", "bullet_train", "valley", "tests", "train_val", ""]
)
def test_other_names_are_not_splits(name):
    assert split_of(name) is None
    assert split_folders("in", [name]) == {}


@pytest.mark.parametrize(
    "pair", [("val", "validation"), ("Train", "train"), ("dev", "val"), ("val1", "val2")]
)
def test_two_folders_for_a_split_are_refused(tmp_path, pair):
    folders(tmp_path, "train", *pair)
    with pytest.raises(SourceError, match=f"more than one folder for .*: {', '.join(pair)}"):
        find_sources(tmp_path, None, 0)


def test_a_folder_named_only_after_its_split_is_preferred(tmp_path):
    found = find_sources(folders(tmp_path, "train", "train_data", "val", "val2"), None, 0)
    assert found.splits["val"][0].file == f"{tmp_path}/val/cat/0.jpg"


TEST_SPLITS = {
    "folders": lambda root: folders(root, "train", "val", "Test"),
    "tars": lambda root: [
        write(root / f"{split}.tar", tar_of({"1.jpg": b"", "1.cls": b"0"}))
        for split in ("train", "val", "Test")
    ],
    "table": lambda root: write(root / "t.csv", "path,label,split\n1,a,train\n2,a,val\n3,,Test\n4,,test\n"),
}


@pytest.mark.parametrize(
    ("form", "unused"),
    [("folders", "Test"), ("tars", "Test.tar"), ("table", "the split test (2 rows)")],
)
def test_a_test_split_is_not_used_and_is_reported(tmp_path, form, unused):
    TEST_SPLITS[form](tmp_path)
    found = find_sources(tmp_path / "t.csv" if form == "table" else tmp_path, None, 0)
    assert found.unused == [unused]
    assert found.strays == []


def test_the_summary_names_unused_splits_and_nothing_is_rejected(tmp_path, call):
    folders(tmp_path / "in", "train", "valid", "test")
    run = call(make_shards.main, "--input", tmp_path / "in", "--out", tmp_path / "out", "--workers", "1")
    assert run.returncode == 0, run.stderr
    assert "not used, as neither train nor val: test\n" in run.stdout
    assert "rejected" not in run.stdout


@pytest.mark.parametrize("names", [("train",), ("Train", "Test"), ("training", "testing")])
def test_the_advice_for_an_input_without_val_works(tmp_path, names):
    folders(tmp_path, *names)
    with pytest.raises(SourceError, match=r"no folder is named val: .* --val-fraction 0\.1") as refusal:
        find_sources(tmp_path, None, 0)
    assert ("rename it to val" in str(refusal.value)) == (len(names) == 2)
    found = find_sources(tmp_path, 0.25, 0)
    assert found.classes == ["cat", "dog"]
    assert {split: len(images) for split, images in found.splits.items()} == {"train": 6, "val": 2}


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_folder_test_among_classes_is_not_a_class(tmp_path, fraction):
    folders(tmp_path, "", "test", classes=("cat", "dog"))
    with pytest.raises(
        SourceError, match=r"has test, but no folder is named train: .* rename test if it is not"
    ):
        find_sources(tmp_path, fraction, 0)


def test_pictures_of_trains_are_a_class(tmp_path):
    folders(tmp_path, "", classes=("bus", "train", "tram"))
    assert find_sources(tmp_path, 0.5, 0).classes == ["bus", "train", "tram"]


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_an_input_one_level_too_high_is_refused_with_the_right_folder(tmp_path, fraction):
    folders(tmp_path / "dataset", "Train", "Val")
    if fraction is None:
        with pytest.raises(SourceError, match=rf"but {tmp_path}/dataset has: give that as --input"):
            find_sources(tmp_path, fraction, 0)
    else:
        (doubt,) = find_sources(tmp_path, fraction, 0).warnings
        assert f"give {tmp_path}/dataset as --input" in doubt


def test_the_advice_for_an_input_without_splits_depends_on_its_content(tmp_path):
    write(tmp_path / "1.jpg", b"")
    assert_refused(tmp_path, rf"images are expected as {tmp_path}/train/<class>/<image>")
    folders(tmp_path / "images", "")
    assert_refused(tmp_path, rf"give {tmp_path}/images as --input, with --val-fraction 0\.1")
    assert find_sources(tmp_path / "images", 0.25, 0).classes == ["cat", "dog"]


def test_several_datasets_at_once_are_refused(tmp_path):
    folders(tmp_path, "a/train", "a/val", "b/train", "b/val")
    with pytest.raises(SourceError, match=rf"{tmp_path}/a has the folders train, val, which are splits"):
        find_sources(tmp_path, 0.25, 0)


def test_splits_inside_train_are_not_classes(tmp_path):
    folders(tmp_path, "train/train", "train/val")
    with pytest.raises(SourceError, match=rf"{tmp_path}/train has the folders train, val, which are splits"):
        find_sources(tmp_path, 0.25, 0)


def test_a_single_class_is_packed_with_exit_code_1(tmp_path, call):
    folders(tmp_path / "in/data", "", classes=("cat", "dog"))
    command = ["--out", tmp_path / "out", "--val-fraction", "0.25", "--workers", "1"]
    run = call(make_shards.main, "--input", tmp_path / "in", *command)
    assert run.returncode == 1
    assert (
        f"has the folders cat, dog: if {tmp_path}/in is one level too high, give {tmp_path}/in/data"
        in run.stderr
    )
    assert "there is only one class, data, so there is nothing to learn" in run.stderr


def test_classes_that_only_train_has_are_named(tmp_path):
    folders(tmp_path, "train", classes=("cat", "cow", "dog"))
    folders(tmp_path, "val", classes=("cat",))
    assert find_sources(tmp_path, None, 0).warnings == [
        "there are no validation images of the classes cow, dog"
    ]


def test_many_classes_that_train_lacks_are_cut_short(tmp_path):
    folders(tmp_path, "train")
    folders(tmp_path, "val", classes=tuple(f"x{n:02d}" for n in range(30)), count=1)
    with pytest.raises(SourceError, match=r"classes that are not in .*: x00, x01, x02, x03, x04 and 25 more"):
        find_sources(tmp_path, None, 0)


def tiny_imagenet(root: Path) -> Path:
    """Tiny ImageNet as downloaded, with two classes of its 200."""
    wnids = ("n01443537", "n02058221")
    lines = []
    for wnid in wnids:
        for number in range(3):
            write(root / f"train/{wnid}/images/{wnid}_{number}.JPEG", image(number))
        write(root / f"train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for number in range(4):
        write(root / f"val/images/val_{number}.JPEG", image(number))
        lines.append(f"val_{number}.JPEG\t{wnids[number % 2]}\t0\t32\t44\t62\n")
        write(root / f"test/images/test_{number}.JPEG", image(number))
    write(root / "val/val_annotations.txt", "".join(lines))
    write(root / "wnids.txt", "\n".join(reversed(wnids)))
    write(
        root / "words.txt",
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02058221\talbatross\n",
    )
    return root


def test_tiny_imagenet_is_packed_as_downloaded(tmp_path):
    progress = Progress()
    pack_here(
        "--input",
        tiny_imagenet(tmp_path / "in"),
        "--out",
        tmp_path / "out",
        "--size",
        "32",
        progress=progress,
    )
    manifest = read_manifest(tmp_path / "out")
    assert [(each.id, each.name) for each in manifest.classes] == [
        ("n01443537", "goldfish, Carassius auratus"),
        ("n02058221", "albatross"),
    ]
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 6, "val": 4}
    assert manifest.rejected == {}
    assert "test" in progress.remarks.notes[0]
    found = find_sources(tmp_path / "in", None, 0).splits["val"]
    assert [(each.path, each.label) for each in found] == [
        ("val/n01443537/val_0.JPEG", 0),
        ("val/n01443537/val_2.JPEG", 0),
        ("val/n02058221/val_1.JPEG", 1),
        ("val/n02058221/val_3.JPEG", 1),
    ]


def test_tiny_imagenet_without_a_label_is_refused(tmp_path):
    write(tiny_imagenet(tmp_path) / "val/images/val_9.JPEG", b"")
    with pytest.raises(SourceError, match=r"val_annotations.txt lacks labels for 1 images.* val_9.JPEG"):
        find_sources(tmp_path, None, 0)
    write(tmp_path / "val/val_annotations.txt", "val_0.JPEG n01443537\n")
    with pytest.raises(
        SourceError, match=r"val_annotations.txt, line 1: expected a file, a tab and a class id"
    ):
        find_sources(tmp_path, None, 0)
