"""Storage that fails while a dataset is packed: the packer waits, stops, or rejects a file.

After each case, `Packing` runs the same command on sound storage and compares the dataset with that of an
undisturbed run.
"""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.packing import images, resume
from pipeline.packing.contents import PackingError, _read
from pipeline.packing.images import RejectedError, pack_image
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.storage import Folder
from tests.endurance.faulty_storage import TWICE, Call, Fault
from tests.endurance.jobs import Outcome, Packing
from tests.trees import write

OUTAGES = ["ESTALE", "ENOTCONN", "EMFILE", "ENOMEM"]  # test_retry.py has them all
OF_A_FILE = ["EACCES", "ENOENT", "ELOOP", "EIO"]
NO_LOCKS = ["ENOLCK", "ENOSYS", "ENOTSUP"]


@pytest.fixture(scope="module")
def packing(pictures, tmp_path_factory) -> Packing:
    """A packing of two classes, with two training pictures and one validation picture in each."""
    folder = tmp_path_factory.mktemp("storage")
    for split, count in (("train", 2), ("val", 1)):
        for label in sorted((pictures / split).iterdir())[:2]:
            for picture in sorted(label.iterdir())[:count]:
                write(folder / "in" / picture.relative_to(pictures), picture.read_bytes())
    return Packing(folder)


@pytest.fixture
def picture(packing) -> str:
    return min(
        call.path for call in packing.calls if call.name == "open" and call.path.startswith("in/train/")
    )


def run_with_fault(packing: Packing, name: str, path: str, error: str, lasting: bool = True) -> Outcome:
    outcome, wrong = packing.try_fault(Fault(Call(name, path), 1, error, lasting))
    assert not wrong
    assert outcome.hits
    return outcome


def rejected(packing: Packing) -> list[str]:
    lines = (packing.output / "report.tsv").read_text().splitlines()
    return [line for line in lines if "rejected" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"), [("stat", "ESTALE"), ("open", "EMFILE"), *(("read", e) for e in OUTAGES)]
)
def test_a_passing_error_is_waited_for_and_reported_once(packing, picture, name, error):
    outcome = run_with_fault(packing, name, picture, error, lasting=False)
    assert outcome.code == 0
    assert outcome.text.startswith(
        f"make-shards: {packing.folder / picture}: {os.strerror(getattr(errno, error))}: "
    )
    assert outcome.text.count("retrying for") == 1
    assert rejected(packing) == []


@pytest.mark.slow
@pytest.mark.parametrize("error", OUTAGES)
def test_an_outage_stops_the_run_and_the_same_command_continues(packing, picture, error):
    outcome = run_with_fault(packing, "read", picture, error)
    assert outcome.code == 1
    assert outcome.text.count("\n") == 2  # the retry, and the end
    assert (
        f"{os.strerror(getattr(errno, error))}: {packing.folder / picture}. The dataset is incomplete"
        in outcome.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("error", OF_A_FILE)
def test_an_error_of_a_file_rejects_the_file_by_name(packing, picture, error):
    outcome = run_with_fault(packing, "open", picture, error)
    assert outcome.code == 0
    assert rejected(packing) == [f"{picture.removeprefix('in/')}\trejected\tunreadable"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"), [("scandir", "EACCES"), ("scandir", "ESTALE"), ("readdir", "EIO")]
)
def test_a_folder_that_cannot_be_listed_is_an_error(packing, picture, name, error):
    outcome = run_with_fault(packing, name, str(Path(picture).parent), error)
    assert outcome.code == 1
    assert str(Path(picture).parent).removeprefix("in/") in outcome.text
    assert os.strerror(getattr(errno, error)) in outcome.text


def test_a_file_that_is_listed_twice_is_packed_once(packing, picture):
    for folder in ("in/train", str(Path(picture).parent), "out/.packing/*", "out"):
        if any(call == Call("readdir", folder) for call in packing.calls):
            assert run_with_fault(packing, "readdir", folder, TWICE).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("error", NO_LOCKS)
def test_storage_without_locks_is_reported_once(packing, error):
    outcome = run_with_fault(packing, "flock", "out/.packing/lock", error)
    assert outcome.code == 0
    assert outcome.text.count("cannot be locked") == 1


def test_a_failing_lock_is_named(packing):
    outcome = run_with_fault(packing, "flock", "out/.packing/lock", "EIO")
    assert outcome.code == 1
    assert f"{os.strerror(errno.EIO)}: {packing.output}/.packing/lock" in outcome.text


def test_an_error_in_closing_the_lock_does_not_fail_the_run(packing):
    outcome = run_with_fault(packing, "close", "out/.packing/lock", "EDQUOT")
    assert outcome.code == 0


@pytest.mark.parametrize("name", ["write", "close", "fsync"])
def test_a_report_that_cannot_be_written_is_named(packing, name):
    call = next(call for call in packing.calls if call.name == name and "report.tsv" in call.path)
    assert "report.tsv" in run_with_fault(packing, name, call.path, "EIO").text


def test_a_lock_that_cannot_be_removed_does_not_fail_a_finished_run(packing):
    """NFS keeps a file that is removed while it is open under another name until it is closed."""
    outcome = run_with_fault(packing, "rmdir", "out/.packing", "ENOTEMPTY", lasting=False)
    assert (outcome.code, outcome.text.count("\n")) == (0, 2)
    assert not (packing.output / ".packing").exists()


def test_locking_gives_up_on_storage_with_unstable_inode_numbers(tmp_path, monkeypatch):
    samestat = Mock(return_value=False)
    monkeypatch.setattr(os.path, "samestat", samestat)
    with resume.locked(Folder(tmp_path)):
        assert samestat.call_count == resume._ATTEMPTS


@pytest.mark.parametrize("error", ["EACCES", "EIO", "ESTALE"])
def test_a_finished_dataset_is_a_success_even_if_the_plan_stays(packing, error):
    outcome = run_with_fault(packing, "unlink", "out/.packing/plan.json", error)
    assert outcome.code == 0
    line, *_ = outcome.text.splitlines()
    assert line.startswith("make-shards: the dataset is complete, but ")
    assert line.endswith(f".packing/plan.json cannot be removed: {os.strerror(getattr(errno, error))}")


def test_a_plan_that_cannot_be_examined_does_not_count_as_absent(tmp_path):
    (tmp_path / "file").touch()
    assert not resume._is_absent(tmp_path / "file")
    assert resume._is_absent(tmp_path / "other")
    assert not resume._is_absent(tmp_path / "file/below")  # an error that leaves it open


# The place of a missing file decides whether the file or the storage is at fault.


def source_at(path: Path, size: int | None = None) -> SourceImage:
    return SourceImage("train/a/1.jpg", 0, str(path), 0, size)


def test_a_missing_file_among_others_is_rejected(tmp_path):
    (tmp_path / "other").touch()
    with pytest.raises(RejectedError, match="unreadable"):
        _read(source_at(tmp_path / "1.jpg"), None)


def test_a_file_whose_folder_is_missing_or_empty_stops_the_run(tmp_path):
    """When a mount is lost, its mount point is an empty folder."""
    for path in (tmp_path / "1.jpg", tmp_path / "gone/1.jpg"):
        with pytest.raises(PackingError, match=f"{path.parent} cannot be read or is empty.*the same command"):
            _read(source_at(path), None)


def test_a_table_may_list_files_that_do_not_exist(tmp_path):
    table = tmp_path / "table.csv"
    table.touch()
    with pytest.raises(RejectedError):
        _read(source_at(tmp_path / "nowhere/1.jpg"), str(table))
    table.unlink()
    with pytest.raises(PackingError, match=str(table)):
        _read(source_at(tmp_path / "nowhere/1.jpg"), str(table))


def test_a_missing_tar_stops_the_run(tmp_path):
    (tmp_path / "other").touch()
    with pytest.raises(PackingError, match="contains other images"):
        _read(source_at(tmp_path / "a.tar", 10), None)


def test_a_huge_file_is_not_read(tmp_path):
    """It takes no room on the disk, and would not fit in the memory of a small machine."""
    with (tmp_path / "1.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(RejectedError, match=r"^too large$"):
        _read(source_at(tmp_path / "1.jpg"), None)
    with pytest.raises(RejectedError, match=r"^too large$"):
        _read(source_at(tmp_path / "1.jpg", 10**11), None)
    assert _read(source_at(tmp_path / "1.jpg", 10), None) == bytes(10)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
@pytest.mark.parametrize("function", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_a_lack_of_memory_or_descriptors_rejects_no_picture(pictures, monkeypatch, function, error):
    content = next(pictures.glob("train/*/*")).read_bytes()
    monkeypatch.setattr(function, Mock(side_effect=error))
    monkeypatch.setattr(images, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(type(error)):
        pack_image(content, "256", 32, 90)


def test_a_picture_that_alone_takes_too_much_memory_is_rejected(pictures, monkeypatch):
    content = next(pictures.glob("train/*/*")).read_bytes()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", Mock(side_effect=MemoryError))
    with pytest.raises(RejectedError, match=r"^out of memory$"):
        pack_image(content, "256", 32, 90)
