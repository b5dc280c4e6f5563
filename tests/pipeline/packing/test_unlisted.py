"""Local folders, tars and tables that cannot be read are named with the error, and never taken for empty.

Each call that lists a folder or opens a file of a small input is made to fail with each error. Then either
the input is refused by a message that names what failed, or all other files are found, and the folder is
named with the reason. test_remote_listing.py does the same for folders behind URLs.
"""

import errno
import gzip
import os
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline import retry
from pipeline.manifest import read_manifest
from pipeline.packing.sources.find import Sources, find_sources
from pipeline.packing.sources.listing import SourceError
from tests.endurance.faulty_storage import Call, Fault, Storage
from tests.trees import assert_refused, tar_of, write
from tools import make_shards

ERRORS = ("EACCES", "EPERM", "ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EIO")
ERRORS += ("ESTALE", "ENOTCONN", "ETIMEDOUT", "EMFILE", "ENOMEM", "EHOSTDOWN", "EREMOTEIO")
FILES = [
    f"{split}/{name}/{file}"
    for split in ("train", "val")
    for name in ("cat", "cow", "dog")
    for file in ("1.jpg", "deep/2.jpg", "deep/er/3.jpg")
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(retry, "_EIO_PAUSES", (0.0,))


@pytest.fixture
def source(tmp_path) -> Path:
    """Class folders with FILES, which are empty."""
    for file in FILES:
        write(tmp_path / "in" / file, b"")
    return tmp_path / "in"


def files_of(sources: Sources) -> set[str]:
    return {source.path for images in sources.splits.values() for source in images}


def find(source: Path, fault: Fault, folder: Path) -> Sources | str:
    """Return what is found, or the message of the refusal. fault: of the storage below a folder."""
    with Storage(folder, fault):
        try:
            return find_sources(source, None, 0)
        except SourceError as refusal:
            return str(refusal)


def check(found: Sources | str, whole: Sources, name: str, reason: str, context: str) -> bool:
    """Check that what failed is named with the reason; return whether files were left out.

    found: what `find` returned. whole: what is found without the fault. context: shown if a check fails.
    """
    if isinstance(found, str):
        assert name in found, context
        assert reason in found or "does not exist" in found, context
        return False
    missing = files_of(whole) - files_of(found)
    covered = {file for file in missing if any(file.startswith(f"{path}/") for path in found.unlisted)}
    assert missing == covered, context
    assert files_of(found) <= files_of(whole), context
    assert found.classes == whole.classes, context
    assert all(reason in each for each in found.unlisted.values()), context
    return bool(missing)


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("error", ERRORS)
def test_each_listing_that_fails_is_reported(source, tmp_path, error, lasting):
    with Storage(tmp_path) as storage:
        whole = find_sources(source, None, 0)
    calls = [call for call in storage.calls if call.name in ("scandir", "readdir", "stat")]
    assert len([call for call in calls if call.name == "scandir"]) == 1 + 2 + 6 * 3
    left_out = 0
    for call in calls:
        for time in range(1, storage.calls[call] + 1):
            fault = Fault(call, time, error, lasting)
            found = find(source, fault, tmp_path)
            left_out += check(found, whole, call.path, os.strerror(getattr(errno, error)), str(fault))
    is_of_a_folder = not retry.is_outage(OSError(getattr(errno, error), ""))
    assert bool(left_out) == (is_of_a_folder and (lasting or error != "EIO"))


def sample(number: int) -> bytes:
    return tar_of(
        {f"{number}.jpg": b"x", f"{number}.cls": b"0", f"{number}b.jpg": b"x", f"{number}b.cls": b"1"}
    )


def webdataset(root: Path) -> None:
    for split in ("train", "val"):
        write(root / f"{split}-0.tar", sample(0))
        write(root / f"{split}-1.tar.gz", gzip.compress(sample(1)))


def class_tars(root: Path) -> None:
    for split in ("train", "val"):
        write(root / split / "cat.tar", tar_of({"1.jpg": b"x"}))
        write(root / split / "dog.tar.gz", gzip.compress(tar_of({"1.jpg": b"x"})))


def imagenet(root: Path) -> None:
    write(root / "ILSVRC2012_img_train.tar", tar_of({"n01.tar": tar_of({"1.JPEG": b"x"})}))
    write(root / "ILSVRC2012_img_val.tar", tar_of({"2.JPEG": b"x"}))
    write(root / "val.txt", "2.JPEG n01\n")
    write(root / "synset_words.txt", "n01 a fish\n")


def hugging_face(root: Path) -> None:
    table = pyarrow.table({"image": [{"bytes": b"x", "path": "1.jpg"}], "label": [0]})
    for split in ("train", "validation"):
        write(root / f"data/{split}-0.parquet", b"")
        parquet.write_table(table, root / f"data/{split}-0.parquet")


def csv_table(root: Path) -> None:
    write(root / "table.csv", "path,label,split\n1.jpg,a,train\n2.jpg,a,val\n")


def parquet_table(root: Path) -> None:
    columns = {"path": ["1.jpg", "2.jpg"], "label": ["a", "a"], "split": ["train", "val"]}
    write(root / "table.parquet", b"")
    parquet.write_table(pyarrow.table(columns), root / "table.parquet")


INPUTS = {  # the functions that make them, and the name of the table, if the input is one
    webdataset: "",
    class_tars: "",
    imagenet: "",
    hugging_face: "",
    csv_table: "table.csv",
    parquet_table: "table.parquet",
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("make", "table"), INPUTS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_each_tar_or_table_that_cannot_be_read_is_named(tmp_path, make, table, error):
    make(tmp_path / "in")
    source = tmp_path / "in" / table
    with Storage(tmp_path) as storage:
        whole = find_sources(source, None, 0)
    calls = [call for call in storage.calls if call.name in ("open", "read")]
    assert calls
    for call in calls:
        fault = Fault(call, 1, error, lasting=True)
        found = find(source, fault, tmp_path)
        if isinstance(found, str):
            assert Path(call.path).name in found, fault
            assert os.strerror(getattr(errno, error)) in found or "has no labels" in found, fault
        else:  # a file with names of classes may be absent
            assert error in ("ENOENT", "ENOTDIR"), fault
            assert (found.splits, found.classes) == (whole.splits, whole.classes), fault


@pytest.mark.parametrize("make", [webdataset, hugging_face], ids=lambda each: each.__name__)
def test_a_folder_that_may_have_tars_or_parquet_files_is_named_in_a_refusal(tmp_path, make):
    """Labels would move if whole classes were missing."""
    make(tmp_path / "in")
    (tmp_path / "in/more").mkdir()
    fault = Fault(Call("scandir", "in/more"), 1, "EACCES", lasting=True)
    message = find(tmp_path / "in", fault, tmp_path)
    assert "1 folder of --input cannot be listed: more (Permission denied)" in message


@pytest.mark.parametrize("target", ["nowhere", "elsewhere"])
def test_a_file_url_is_a_local_folder_whose_links_are_followed(source, tmp_path, target):
    write(tmp_path / "elsewhere/9.jpg", b"")
    (source / "train/cat/more").symlink_to(tmp_path / target)
    found = find_sources(f"file://{source}", None, 0)
    assert found == find_sources(source, None, 0)
    assert ("train/cat/more/9.jpg" in files_of(found)) != ("train/cat/more" in found.unlisted)


@pytest.mark.parametrize("target", ["nowhere", "closed", "loop"])
@pytest.mark.parametrize("path", ["train/more", "train/cat/more", "val/cat/more"])
def test_links_to_folders_that_cannot_be_reached_are_named(source, tmp_path, path, target):
    link = source / path
    link.symlink_to(link if target == "loop" else tmp_path / target)
    found = find_sources(source, None, 0)
    assert list(found.unlisted) == [path]
    assert files_of(found) == set(FILES)


def test_a_link_with_the_name_of_an_image_is_taken_for_an_image(source, tmp_path):
    (source / "train/cat/9.jpg").symlink_to(tmp_path / "nowhere")
    found = find_sources(source, None, 0)
    assert found.unlisted == {}
    assert files_of(found) == {*FILES, "train/cat/9.jpg"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_a_broken_link_is_refused_by_name(source, tmp_path, split):
    shutil.rmtree(source / split)
    (source / split).symlink_to(tmp_path / "unmounted")
    assert_refused(source, f"{source}/{split}")


# The whole command: what is in the report, and the exit code.


@pytest.fixture
def readable(tmp_path, pictures) -> Path:
    """Two pictures in each of three classes; one of two in a folder below."""
    for split in ("train", "val"):
        for folder in sorted((pictures / split).iterdir())[:3]:
            for number, picture in enumerate(sorted(folder.iterdir())[:2]):
                name = "deep/1.jpg" if number else "0.jpg"
                write(tmp_path / "in" / split / folder.name / name, picture.read_bytes())
    return tmp_path / "in"


ACCEPTING = ("--max-reject-ratio", "1", "--workers", "1")


def second_class(folder: Path) -> str:
    return sorted(path.name for path in folder.iterdir())[1]


def packing(call, source: Path, output: Path, fault: Fault):
    with Storage(source.parent, fault):
        return call(make_shards.main, "--input", source, "--out", output, "--size", "32", *ACCEPTING)


@pytest.mark.parametrize("below", ["", "/deep"])
def test_a_folder_that_cannot_be_listed_is_in_the_report_and_makes_the_exit_code_1(
    readable, tmp_path, call, below
):
    name = second_class(readable / "train")
    folder = f"train/{name}{below}"
    run = packing(call, readable, tmp_path / "out", Fault(Call("scandir", f"in/{folder}"), 1, "EACCES", True))
    assert run.returncode == 1
    assert f"1 folder of --input cannot be listed: {folder} (Permission denied)" in run.stderr
    assert "--overwrite" in run.stderr
    assert f"{folder}/\trejected\tunreadable folder\n" in (tmp_path / "out/report.tsv").read_text()
    manifest = read_manifest(tmp_path / "out")
    assert manifest.split("train").samples == (5 if below else 4)
    assert manifest.split("val").samples == 6
    assert len(manifest.classes) == 3  # so no label moves


def test_a_class_whose_images_were_all_rejected_is_named(readable, tmp_path, call):
    for split, exit_code in (("val", 0), ("train", 1)):
        name = second_class(readable / split)
        for file in (readable / split / name).rglob("*.jpg"):
            file.write_bytes(b"<html>")
        command = ["--input", readable, "--out", tmp_path / split, "--size", "32"]
        run = call(make_shards.main, *command, *ACCEPTING)
        assert run.returncode == exit_code
        assert f"all images of {split} were rejected in 1 class: {name}" in run.stderr
