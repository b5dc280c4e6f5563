"""Storage whose Python functions fail: the harness itself and a sample of its cases."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endurance.faulty_storage import ERRORS, SHORT, TWICE, Call, Fault, Storage
from tests.helpers import REPO


def fault(name: str, path: str, error: str, time: int = 1, lasting: bool = False) -> Fault:
    return Fault(Call(name, path), time, error, lasting)


def test_calls_are_counted_for_each_file(tmp_path):
    with Storage(tmp_path) as storage:
        (tmp_path / "a").write_text("1")
        (tmp_path / "a").read_text()
        (tmp_path / "a").rename(tmp_path / "b")
        assert os.listdir(tmp_path) == ["b"]  # noqa: PTH208
        shutil.rmtree(tmp_path)
        Path("/proc/self/stat").read_text()
    assert storage.calls[Call("create", "a")] == storage.calls[Call("write", "a")] == 1
    assert storage.calls[Call("open", "a")] == storage.calls[Call("replace", "b")] == 1
    assert storage.calls[Call("unlink", "b")] == 1
    assert not any("proc" in call.path for call in storage.calls)


@pytest.mark.parametrize(("lasting", "hits"), [(False, 1), (True, 3)])
def test_a_call_fails_once_or_from_then_on(tmp_path, lasting, hits):
    path = tmp_path / "a"
    path.write_text("1")
    with Storage(tmp_path, fault("open", "a", "ESTALE", time=2, lasting=lasting)) as storage:
        for number in range(1, 5):
            if number == 2 or (lasting and number > 2):
                with pytest.raises(OSError, match=str(path)) as error:
                    path.read_text()
                assert error.value.errno == errno.ESTALE
            else:
                assert path.read_text() == "1"
    assert storage.hits == hits


def test_short_reads_and_writes_lose_nothing(tmp_path):
    content = bytes(range(256)) * 100
    with Storage(tmp_path, fault("write", "a", SHORT, lasting=True)) as storage:
        (tmp_path / "a").write_bytes(content)
    assert storage.hits > 1
    with (
        Storage(tmp_path, fault("read", "a", SHORT, lasting=True)) as storage,
        open(tmp_path / "a", "rb") as file,
    ):
        assert file.read(len(content)) == content
    assert storage.hits > 1


def test_an_entry_can_be_listed_twice(tmp_path):
    (tmp_path / "a").touch()
    with Storage(tmp_path, fault("readdir", "", TWICE)):
        assert os.listdir(tmp_path) == ["a", "a"]  # noqa: PTH208


def test_functions_are_restored_afterwards(tmp_path):
    before = [open, io.open, os.stat, os.scandir, os.fsync]
    with Storage(tmp_path):
        assert before[0] is not open
    assert before == [open, io.open, os.stat, os.scandir, os.fsync]


def test_each_error_exists_on_this_system():
    for errors in ERRORS.values():
        assert all(hasattr(errno, error) for error in errors if error not in (SHORT, TWICE))


@pytest.mark.slow
def test_packing_survives_a_sample_of_all_faults():
    command = [sys.executable, "tests/endurance/faults.py", "--seconds", "100", "--seed", "2012"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
