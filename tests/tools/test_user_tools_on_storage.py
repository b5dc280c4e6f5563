"""Exporting and classifying on storage that fails, or without a folder for temporary files."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.files import read_fully
from tests.helpers import REPO
from tools.classify import open_output
from tools.classifying import nets
from tools.classifying.inputs import InputError
from tools.classifying.output import Result
from tools.classifying.pictures import read

# Fail as tempfile does if it finds no writable folder.
WITHOUT_TEMPORARY_FOLDER = """
import runpy, sys, tempfile

def refuse():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

tempfile._get_default_tempdir = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["tools/export.py", "{run}", "--out", "{run}/net.pt2"],
        ["tools/import_weights.py", "net.pth", "--out", "{run}/new"],
        ["tools/classify.py", "{run}", "--run", "{run}"],
    ],
    ids=lambda command: Path(command[0]).stem,
)
def test_a_missing_temporary_folder_is_reported_in_one_line(tmp_path, command):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text('{"dataset": ""}')
    (run / "net.json").write_text("{}")
    (run / "a.jpg").touch()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TEMPORARY_FOLDER, *(part.format(run=run) for part in command)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(Path(command[0]).stem.replace("_", "-") + ": ")


def fail_reads(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
    """Make the first `times` reads of whole files fail."""
    left = iter(range(times))

    def answer(file: io.FileIO, size: int) -> bytes:
        if next(left, None) is not None:
            raise failure(code)
        return read_fully(file, size)

    monkeypatch.setattr("pipeline.retry.time.sleep", lambda _: None)
    monkeypatch.setattr("pipeline.files.read_fully", answer)


@pytest.fixture
def picture(pictures) -> Path:
    return next((pictures / "val").rglob("*.JPEG"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_picture_that_is_briefly_unreadable_is_classified(picture, monkeypatch, code):
    fail_reads(monkeypatch, code, times=2)
    assert read(picture).size == (144, 144)


def test_an_outage_is_not_reported_as_a_broken_picture(picture, monkeypatch):
    fail_reads(monkeypatch, errno.ENOTCONN, times=1000)
    with pytest.raises(OSError, match="not connected") as error:
        read(picture)
    assert error.value.filename == str(picture)


def test_a_picture_that_stays_unreadable_counts_as_failed(picture, monkeypatch):
    fail_reads(monkeypatch, errno.EIO, times=1000)
    with pytest.raises(InputError, match=f"{picture}: Input/output error"):
        read(picture)


def test_an_error_writing_results_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "classes.jsonl"

    def full(*_: object, **__: object) -> None:
        raise failure(errno.ENOSPC)

    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError, match="No space left") as error, open_output(path) as write:
        write(Result("a.jpg", []))
    assert error.value.filename == str(path)


def test_a_net_that_cannot_be_read_is_not_called_broken(tmp_path, monkeypatch):
    path = tmp_path / "net.pt2"
    path.write_text("a net")

    def stale(*_: object, **__: object) -> None:
        raise failure(errno.ESTALE)

    monkeypatch.setattr(nets, "ZipFile", stale)
    with pytest.raises(OSError, match="Stale") as error:
        nets.open_export(path)
    assert error.value.filename == str(path)
