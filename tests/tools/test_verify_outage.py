"""Verifying and inspecting on failing storage: what counts as damage, and which file is named."""

import errno
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from pipeline.manifest import read_manifest
from pipeline.shards import read_index
from tests.endurance.faulty_storage import Call, Fault, Storage
from tools import inspect_shards, verify_shards
from tools.verify_shards import verify
from tools.verifying import checks

pytestmark = pytest.mark.usefixtures("_one_process_verifies")

TAR, INDEX, IDX = "train-000001.tar", "train.index.npy", "train-000001.idx"


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture
def dataset(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def fault(name: str, path: str, error: str, lasting: bool = True) -> Fault:
    return Fault(Call(name, path), 1, error, lasting)


@pytest.mark.parametrize("file", [TAR, INDEX, IDX])
@pytest.mark.parametrize(
    ("name", "error"), [("open", "EMFILE"), ("read", "ESTALE"), ("read", "EIO"), ("read", "EAGAIN")]
)
def test_a_transient_error_is_not_damage(dataset, file, name, error):
    with Storage(dataset, fault(name, file, error, lasting=False)) as storage:
        assert verify(dataset, "sampled", 1).count == 0
    assert storage.hits == 1


@pytest.mark.parametrize("file", [TAR, INDEX, IDX])
@pytest.mark.parametrize(("name", "error"), [("open", "EMFILE"), ("read", "ESTALE"), ("read", "EAGAIN")])
def test_an_outage_ends_verification_and_is_not_damage(dataset, file, name, error):
    with Storage(dataset, fault(name, file, error)), pytest.raises(OSError, match=file) as found:
        verify(dataset, "sampled", 1)
    assert found.value.errno == getattr(errno, error)


@pytest.mark.parametrize(("name", "error"), [("read", "EIO"), ("open", "EACCES")])
@pytest.mark.parametrize("file", [TAR, IDX])
def test_a_file_that_stays_unreadable_is_damage(dataset, file, name, error):
    with Storage(dataset, fault(name, file, error)):
        (problem,) = verify(dataset, "sampled", 1).problems
    assert str(problem) == f"{file}: cannot be read: {os.strerror(getattr(errno, error))}"


def test_a_dataset_that_disappears_is_not_reported_as_missing_shards(dataset, monkeypatch):
    manifest = read_manifest(dataset)
    monkeypatch.setattr(verify_shards, "read_manifest", lambda _: manifest)
    monkeypatch.setattr(verify_shards, "check_dataset", lambda *_: [])
    monkeypatch.setattr(verify_shards, "check_index", lambda *_: (None, []))
    shutil.rmtree(dataset)
    dataset.mkdir()
    with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):
        verify(dataset, "sampled", 1)


@pytest.mark.parametrize("decode", ["sampled", "all"])
def test_a_correct_second_read_does_not_hide_a_wrong_first_one(dataset, monkeypatch, decode):
    class Flaky(checks._Hashed):
        """Flip a bit the first time that the second tar is read."""

        def read(self, size: int) -> bytes:
            data = super().read(size)
            if self._file.name.endswith(TAR) and not readings:
                readings.append(self)
                self.digest.update(b"as if")
            return data

    readings: list[Flaky] = []
    monkeypatch.setattr(checks, "_Hashed", Flaky)
    (problem,) = verify(dataset, decode, 1).problems
    assert problem.file == TAR
    assert "its sha256 differs from the one in dataset.json" in problem.what
    assert ("gave different bytes when read twice" in problem.what) == (decode == "sampled")


def test_running_out_of_memory_is_not_damage(dataset, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(MemoryError):
        verify(dataset, "sampled", 1)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle", "/mnt/a.tar"), MemoryError()])
def test_the_command_reports_an_outage_in_one_line(dataset, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(verify_shards, "verify", fail)
    monkeypatch.setattr(sys, "argv", ["verify_shards.py", "--data", str(dataset)])
    with pytest.raises(SystemExit) as end:
        verify_shards.main()
    if isinstance(error, OSError):
        assert end.value.code.startswith(
            "verify-shards: /mnt/a.tar: Stale file handle: the check is incomplete"
        )
    else:
        assert end.value.code == "verify-shards: out of memory: try fewer --workers"


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_errors_reading_dataset_json_and_index_name_the_file(dataset, error):
    manifest = read_manifest(dataset)
    for file, read in (
        ("dataset.json", lambda: read_manifest(dataset)),
        (INDEX, lambda: read_index(dataset, manifest.split("train"), len(manifest.classes))),
    ):
        with Storage(dataset, fault("read", file, error)), pytest.raises(OSError, match=f"{dataset}/{file}"):
            read()


@pytest.mark.parametrize(("name", "file"), [("read", "shards/dataset.json"), ("write", "report/report.md")])
def test_inspecting_names_the_file_and_what_to_do(dataset, monkeypatch, name, file):
    root = dataset.parent
    command = ["inspect_shards.py", "--data", str(dataset), "--out", str(root / "report")]
    monkeypatch.setattr(sys, "argv", command)
    with Storage(root, fault(name, file, "EIO")), pytest.raises(SystemExit) as end:
        inspect_shards.main()
    path = root / file if name == "read" else root / "report"
    reason = os.strerror(errno.EIO)
    assert end.value.code == f"inspect-shards: {path}: {reason}: fix the cause and run the same command again"
