"""Files that desktops, notebooks, NAS boxes and archivers leave among images are ignored and counted."""

import pytest

from pipeline.packing.progress import Progress
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.litter import litter_in
from tests.trees import Tree, class_folders, pack_here, packed_files, tar_of, tars, upload, write
from tools import make_shards

FILES = (
    ".DS_Store",
    "._1.jpg",
    ".directory",
    ".nfs000000000123",
    ".fuse_hidden0001",
    ".gitkeep",
    "Thumbs.db",
    "THUMBS.DB",
    "Thumbs.db:encryptable",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "Desktop.ini",
    "Icon\r",
    "Icon\uf00d",
    "Picasa.ini",
    "1.jpg~",
    "~$labels.xlsx",
    ".~lock.labels.ods#",
    ".1.jpg.swp",
)
FOLDERS = (
    ".ipynb_checkpoints",
    ".AppleDouble",
    ".Trash-1000",
    ".Trashes",
    ".Spotlight-V100",
    ".git",
    ".cache",
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "#snapshot",
    "@Recycle",
    "@Recently-Snapshot",
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "lost+found",
    "Network Trash Folder",
    "Temporary Items",
    "__pycache__",
    "PaxHeaders.1234",
)
CLASSES = ("cat", "a.b", "_background_noise_", "__background__", "#1", "@home", "icon", "n01", "c++", "~home")
CLASSES += ("recycler", "temporary items")


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_path_is_litter_from_its_first_such_part_on(name):
    assert litter_in(name) == name
    assert litter_in(f"train/cat/{name}") == f"train/cat/{name}"
    assert litter_in(f"train/{name}/cat/1.jpg") == f"train/{name}"


@pytest.mark.parametrize(
    "name", [*CLASSES, ".", "..", "1.jpg", "desktop.ini.jpg", "Thumbs.db.png", "Icon\r1"]
)
def test_other_names_are_not_litter(name):
    assert litter_in(f"train/{name}/1.jpg") is None
    assert litter_in(name) is None


@pytest.fixture(scope="module")
def tree(pictures) -> Tree:
    """Drawn pictures of three classes."""
    return {
        split: {
            folder.name: {f"{split}_{n}_{each.name}": each.read_bytes() for each in sorted(folder.iterdir())}
            for n, folder in enumerate(sorted((pictures / split).iterdir())[:3])
        }
        for split in ("train", "val")
    }


def littered(tree: Tree) -> Tree:
    """Return the tree with litter of each kind among the images and the classes."""
    junk = dict.fromkeys(FILES, b"\0\5\x16\7")
    return {
        split: {name: files | junk for name, files in classes.items()}
        | {name: {"1.jpg": next(iter(classes[min(classes)].values()))} for name in FOLDERS}
        for split, classes in tree.items()
    }


def test_class_folders_with_litter_pack_to_the_same_bytes(tree, tmp_path):
    clean = packed_files(class_folders(tree, tmp_path / "clean"), tmp_path / "a")
    assert packed_files(class_folders(littered(tree), tmp_path / "in"), tmp_path / "b") == clean


def test_class_folders_behind_a_url_with_litter_pack_to_the_same_bytes(tree, tmp_path):
    upload(class_folders(tree, tmp_path / "clean"), "memory://clean")
    upload(class_folders(littered(tree), tmp_path / "in"), "memory://littered")
    assert packed_files("memory://littered", tmp_path / "b") == packed_files("memory://clean", tmp_path / "a")


def test_imagenets_tars_with_litter_pack_to_the_same_bytes(tree, tmp_path):
    clean = packed_files(tars(tree, tmp_path / "clean"), tmp_path / "a")
    junk = dict.fromkeys(FILES, b"junk")
    tars(tree, tmp_path / "in")
    inside = {f"{name}.tar": tar_of(junk | files) for name, files in tree["train"].items()}
    write(
        tmp_path / "in/ILSVRC2012_img_train.tar", tar_of(inside | {f"._{name}": b"junk" for name in inside})
    )
    val = {name: content for files in tree["val"].values() for name, content in files.items()}
    write(tmp_path / "in/ILSVRC2012_img_val.tar", tar_of(junk | val | {f"._{name}": b"junk" for name in val}))
    assert packed_files(tmp_path / "in", tmp_path / "b") == clean


def test_class_tars_with_litter_pack_to_the_same_bytes(tree, tmp_path):
    for split, classes in tree.items():
        for name, files in classes.items():
            write(tmp_path / "clean" / split / f"{name}.tar", tar_of(files))
            write(tmp_path / "in" / split / f"{name}.tar", tar_of(dict.fromkeys(FILES, b"junk") | files))
            write(tmp_path / "in" / split / f"._{name}.tar", b"junk")
        (tmp_path / "in" / split / ".ipynb_checkpoints").mkdir()
    clean = packed_files(tmp_path / "clean", tmp_path / "a")
    assert packed_files(tmp_path / "in", tmp_path / "b") == clean


def test_webdataset_tars_with_litter_have_the_same_samples(tmp_path):
    for split in ("train", "val"):
        samples = {"1.jpg": b"a", "._1.jpg": b"junk", "PaxHeader/1.jpg": b"junk", "1.cls": b"0"}
        write(tmp_path / f"{split}.tar", tar_of({"__meta__.json": b"{}", "._1.cls": b"1"} | samples))
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache/train-1.tar", b"junk")
    found = find_sources(tmp_path, None, 0)
    assert [source.path for source in found.splits["train"]] == ["train.tar/1.jpg"]
    assert (found.classes, found.strays) == (["0"], [])
    assert len(found.litter) == 9


def test_a_file_that_a_table_lists_is_packed_whatever_its_name(tmp_path):
    write(tmp_path / "t.csv", "path,label,split\n.hidden/._1.jpg,a,train\nThumbs.db,a,val\n")
    splits = find_sources(tmp_path / "t.csv", None, 0).splits
    assert [each.path for split in splits.values() for each in split] == [".hidden/._1.jpg", "Thumbs.db"]


def test_the_summary_counts_litter_and_the_exit_code_is_0(tree, tmp_path, call):
    class_folders(tree, tmp_path / "in")
    for name in (".DS_Store", "._a.jpg", "Thumbs.db"):
        write(tmp_path / "in/train" / min(tree["train"]) / name, b"junk")
    write(tmp_path / "in/train/.ipynb_checkpoints/1.jpg", b"junk")
    run = call(make_shards.main, "--input", tmp_path / "in", "--out", tmp_path / "out", "--workers", "1")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if "ignored" in line]
    assert lines == [
        "ignored 4 files and folders that desktops and archivers leave (.DS_Store, ._a.jpg, "
        ".ipynb_checkpoints, Thumbs.db)"
    ]


def test_without_litter_the_summary_does_not_mention_it(tree, tmp_path):
    progress = Progress()
    pack_here("--input", class_folders(tree, tmp_path / "in"), "--out", tmp_path / "out", progress=progress)
    assert progress.remarks.notes == progress.remarks.faults == []


def test_a_dataset_in_a_hidden_folder_is_packed(tree, tmp_path):
    source = class_folders(tree, tmp_path / ".cache/dataset")
    assert find_sources(source, None, 0).litter == frozenset()
    assert len(find_sources(source, None, 0).classes) == 3
