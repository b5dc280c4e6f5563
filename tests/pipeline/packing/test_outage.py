"""Storage that fails while a dataset is packed: what is waited for, what stops the run, what rejects a file.

Each case ends with the same command on sound storage, which `Packing` compares with an undisturbed run.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.packing import images, resume
from pipeline.packing.images import RejectedError, pack_image
from pipeline.packing.reading import PackingError, _read
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.storage import Folder
from tests.endurance.faulty_storage import TWICE, Call, Fault
from tests.endurance.jobs import Outcome, Packing

OUTAGES = ["ESTALE", "ENOTCONN", "EMFILE", "ENOMEM"]  # test_retry.py has them all
OF_A_FILE = ["EACCES", "ENOENT", "ELOOP", "EIO"]
NO_LOCKS = ["ENOLCK", "ENOSYS", "ENOTSUP"]


@pytest.fixture(scope="module")
def packing(pictures, tmp_path_factory) -> Packing:
    """Of two classes, in train two pictures each, in val one."""
    folder = tmp_path_factory.mktemp("storage")
    for split, count in (("train", 2), ("val", 1)):
        for label in sorted((pictures / split).iterdir())[:2]:
            (folder / "in" / split / label.name).mkdir(parents=True)
            for picture in sorted(label.iterdir())[:count]:
                shutil.copy(picture, folder / "in" / split / label.name)
    return Packing(folder)


@pytest.fixture
def picture(packing) -> str:
    return min(
        call.path for call in packing.calls if call.name == "open" and call.path.startswith("in/train/")
    )


def fails(packing: Packing, name: str, path: str, error: str, lasting: bool = True, time: int = 1) -> Outcome:
    outcome, wrong = packing.try_fault(Fault(Call(name, path), time, error, lasting))
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
def test_what_passes_is_waited_for(packing, picture, name, error):
    outcome = fails(packing, name, picture, error, lasting=False)
    assert outcome.code == 0
    assert outcome.text.startswith(
        f"make_shards: {packing.folder / picture}: {os.strerror(getattr(errno, error))}: "
    )
    assert outcome.text.count("retrying for") == 1
    assert rejected(packing) == []


@pytest.mark.slow
@pytest.mark.parametrize("error", OUTAGES)
def test_an_outage_stops_the_run_and_the_same_command_continues(packing, picture, error):
    outcome = fails(packing, "read", picture, error)
    assert outcome.code == 1
    assert outcome.text.count("\n") == 2  # that it is tried again, and the end
    assert (
        f"{os.strerror(getattr(errno, error))}: {packing.folder / picture}. The dataset is incomplete"
        in outcome.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("error", OF_A_FILE)
def test_what_belongs_to_a_file_rejects_it_by_name(packing, picture, error):
    outcome = fails(packing, "open", picture, error)
    assert outcome.code == 0
    assert rejected(packing) == [f"{picture.removeprefix('in/')}\trejected\tunreadable"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"), [("scandir", "EACCES"), ("scandir", "ESTALE"), ("readdir", "EIO")]
)
def test_a_folder_that_cannot_be_listed_is_not_empty(packing, picture, name, error):
    outcome = fails(packing, name, str(Path(picture).parent), error)
    assert outcome.code == 1
    assert str(Path(picture).parent) in outcome.text
    assert os.strerror(getattr(errno, error)) in outcome.text


def test_what_is_listed_twice_is_packed_once(packing, picture):
    for folder in ("in/train", str(Path(picture).parent), "out/.packing/*", "out"):
        if any(call == Call("readdir", folder) for call in packing.calls):
            assert fails(packing, "readdir", folder, TWICE).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("error", NO_LOCKS)
def test_storage_without_locks_is_said_once(packing, error):
    outcome = fails(packing, "flock", "out/.packing/lock", error)
    assert outcome.code == 0
    assert outcome.text.count("cannot be locked") == 1


def test_a_lock_that_fails_is_named(packing):
    outcome = fails(packing, "flock", "out/.packing/lock", "EIO")
    assert outcome.code == 1
    assert f"{os.strerror(errno.EIO)}: {packing.output}/.packing/lock" in outcome.text


def test_an_error_is_not_hidden_by_that_of_closing_the_lock(packing):
    outcome = fails(packing, "close", "out/.packing/lock", "EDQUOT")
    assert outcome.code == 0


@pytest.mark.parametrize("name", ["write", "close", "fsync"])
def test_the_report_is_named_where_it_cannot_be_written(packing, name):
    call = next(call for call in packing.calls if call.name == name and "report.tsv" in call.path)
    assert "report.tsv" in fails(packing, name, call.path, "EIO").text


def test_a_lock_that_stays_under_another_name_does_not_end_a_whole_packing(packing):
    """As NFS keeps a file that is removed while it is open, until it is closed."""
    outcome = fails(packing, "rmdir", "out/.packing", "ENOTEMPTY", lasting=False)
    assert (outcome.code, outcome.text.count("\n")) == (0, 2)
    assert not (packing.output / ".packing").exists()


def test_numbers_of_files_that_change_at_each_look_end_no_wait(tmp_path, monkeypatch):
    looks = []

    def differ(*_):
        looks.append(1)
        return False

    monkeypatch.setattr(os.path, "samestat", differ)
    with resume.locked(Folder(tmp_path)):
        assert len(looks) == resume._ATTEMPTS


@pytest.mark.parametrize("error", ["EACCES", "EIO", "ESTALE"])
def test_a_dataset_that_is_there_is_not_denied(packing, error):
    outcome = fails(packing, "unlink", "out/.packing/plan.json", error)
    assert outcome.code == 0
    line, *_ = outcome.text.splitlines()
    assert line.startswith("make_shards: the dataset is complete, but ")
    assert line.endswith(f".packing/plan.json cannot be removed: {os.strerror(getattr(errno, error))}")


def test_a_plan_that_cannot_be_looked_at_keeps_the_records(tmp_path):
    (tmp_path / "file").touch()
    assert not resume._is_absent(tmp_path / "file")
    assert resume._is_absent(tmp_path / "other")
    assert not resume._is_absent(tmp_path / "file/below")  # which says nothing of the plan


# Where a file was found tells whose trouble it is that it is missing.


def source_at(path: Path, size: int | None = None) -> SourceImage:
    return SourceImage("train/a/1.jpg", 0, str(path), 0, size)


def test_a_missing_file_among_others_is_rejected(tmp_path):
    (tmp_path / "other").touch()
    with pytest.raises(RejectedError, match="unreadable"):
        _read(source_at(tmp_path / "1.jpg"), None)


def test_a_file_whose_folder_is_gone_or_empty_is_the_storages(tmp_path):
    """As when a mount goes away, whose place is an empty folder then."""
    for path in (tmp_path / "1.jpg", tmp_path / "gone/1.jpg"):
        with pytest.raises(PackingError, match=f"{path.parent} cannot be read or is empty.*the same command"):
            _read(source_at(path), None)


def test_a_table_may_name_what_was_never_there(tmp_path):
    table = tmp_path / "table.csv"
    table.touch()
    with pytest.raises(RejectedError):
        _read(source_at(tmp_path / "nowhere/1.jpg"), str(table))
    table.unlink()
    with pytest.raises(PackingError, match=str(table)):
        _read(source_at(tmp_path / "nowhere/1.jpg"), str(table))


def test_a_tar_that_is_gone_is_not_many_bad_pictures(tmp_path):
    (tmp_path / "other").touch()
    with pytest.raises(PackingError, match="contains other images"):
        _read(source_at(tmp_path / "a.tar", 10), None)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
@pytest.mark.parametrize("function", ["open", "load"])
def test_a_process_in_need_rejects_no_picture(pictures, monkeypatch, function, error):
    def fail(*_, **__):
        raise error

    where = "PIL.Image.open" if function == "open" else "PIL.ImageFile.ImageFile.load"
    content = next(pictures.glob("train/*/*")).read_bytes()
    monkeypatch.setattr(where, fail)
    monkeypatch.setattr(images, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(type(error)):
        pack_image(content, "256", 32, 90)


def test_a_picture_that_alone_takes_too_much_memory_is_rejected(pictures, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    content = next(pictures.glob("train/*/*")).read_bytes()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(RejectedError, match=r"^out of memory$"):
        pack_image(content, "256", 32, 90)
