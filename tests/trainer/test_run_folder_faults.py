"""The run folder on failing storage: rows are written completely and once, errors name files, locks hold."""

import builtins
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import read_fully
from pipeline.manifest import read_manifest
from tests.endurance.faulty_storage import Call, Fault, Storage
from tests.helpers import command, main
from trainer import run as run_module
from trainer import table as table_module
from trainer.run import Run, RunError
from trainer.setting_sources import load_settings
from trainer.table import Table

FOR_EVER = 1000  # calls


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise failure(code)

    return refuse


class FailingFile:
    """A file opened for writing that fails to close after everything has been written."""

    def __init__(self, *arguments: Any, **options: Any):
        self.file = builtins.open(*arguments, **options)  # noqa: SIM115

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()
        raise failure(errno.EIO)


@pytest.fixture
def table(tmp_path) -> Table:
    return Table(tmp_path / "metrics.csv")


@pytest.mark.parametrize("truncates", [True, False])
def test_a_row_is_written_once_although_closing_the_file_failed(table, monkeypatch, truncates):
    table.append({"step": 1, "loss": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "open", FailingFile, raising=False)
        if not truncates:
            patch.setattr(os, "truncate", refusing(errno.EIO))
        table.append({"step": 2, "loss": 0.5})
        with pytest.raises(OSError, match="Input/output error") as error:
            table.sync()
        assert error.value.filename == str(table.path)
    table.append({"step": 3, "loss": 0.5})
    table.sync()
    assert table.path.read_text() == "step,loss\n1,0.5\n2,0.5\n3,0.5\n"


def test_a_table_whose_first_row_fails_has_one_header(table, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "open", FailingFile, raising=False)
        table.append({"step": 1, "loss": 0.5})
    table.append({"step": 2, "loss": 0.5})
    assert table.path.read_text() == "step,loss\n1,0.5\n2,0.5\n"


def test_a_table_is_synced_through_a_writable_handle(table, monkeypatch):
    """Some network file systems cannot sync through a handle opened for reading."""

    def fsync(file: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise failure(errno.EBADF)
        synced.append(file)

    synced: list[int] = []
    table.append({"step": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    table.sync()
    assert len(synced) == 1


def test_a_table_that_cannot_be_closed_is_named(table):
    table.append({"step": 1})
    fault = Fault(Call("close", table.path.name), 1, "EIO", lasting=False)
    with Storage(table.path.parent, fault), pytest.raises(OSError, match=table.path.name):
        table.sync()


def test_syncing_does_not_create_a_table(table):
    table.sync()
    assert not table.path.exists()


@pytest.fixture
def unreadable(monkeypatch) -> Callable[..., None]:
    """Make a number of reads of files with a given name fail."""

    def fail(name: str, code: int, times: int) -> None:
        failed = []

        def answer(file: io.FileIO, size: int) -> bytes:
            if Path(file.name).name == name and len(failed) < times:
                failed.append(file)
                raise failure(code)
            return read_fully(file, size)

        monkeypatch.setattr("pipeline.files.read_fully", answer)

    return fail


NAMES = ["settings.json", "environment.json", "metrics.csv", "evaluations.csv"]


@pytest.fixture
def unfinished(whole, tmp_path) -> Path:
    """A run that lacks only its report."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "report.md").unlink()
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_an_unreadable_file_is_named_and_a_temporary_error_is_waited_out(
    packed, unfinished, monkeypatch, capsys, unreadable, name, code
):
    arguments = command(packed, unfinished, "--checkpoint-steps", "2")
    unreadable(name, code, FOR_EVER)
    assert main(monkeypatch, arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"alexnet-train: {unfinished / name}: {os.strerror(code)}: "
        "fix the cause and run the same command again"
    )
    monkeypatch.undo()
    unreadable(name, code, 2)
    assert main(monkeypatch, arguments) == 0
    assert (unfinished / "report.md").exists()


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_damaged_file_is_named(packed, unfinished, monkeypatch, capsys, name):
    (unfinished / name).write_bytes(b'{"seed": ')
    assert main(monkeypatch, command(packed, unfinished)) == 1
    assert f"{unfinished / name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["loss.png", "report.md"])
def test_a_report_that_cannot_be_written_is_named_and_written_on_the_next_attempt(
    packed, unfinished, monkeypatch, capsys, name
):
    from trainer.monitor import report

    plot, atomic_write = report._plot, report.atomic_write

    def full(path: Path, *_: object) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(report, "_plot", lambda path, *more: full(path) or plot(path, *more))
    monkeypatch.setattr(report, "atomic_write", lambda path: full(path) or atomic_write(path))
    arguments = command(packed, unfinished, "--checkpoint-steps", "2")
    assert main(monkeypatch, arguments) == 1
    assert f"{unfinished / name}: No space left on device" in capsys.readouterr().err
    assert not Run(unfinished).is_finished
    monkeypatch.undo()
    assert main(monkeypatch, arguments) == 0
    assert Run(unfinished).is_finished


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_missing_table_is_named(packed, unfinished, monkeypatch, capsys, name):
    (unfinished / name).unlink()
    assert main(monkeypatch, command(packed, unfinished, "--checkpoint-steps", "2")) == 1
    assert f"cannot write a report: {unfinished / name}" in capsys.readouterr().err


def test_a_missing_environment_file_does_not_prevent_the_report(packed, unfinished, tmp_path, monkeypatch):
    with Storage(tmp_path, Fault(Call("open", "run/environment.json"), 2, "ENOENT", lasting=True)) as storage:
        assert main(monkeypatch, command(packed, unfinished, "--checkpoint-steps", "2")) == 0
    assert storage.hits
    assert Run(unfinished).is_finished


def test_a_folder_without_settings_is_not_a_run_and_keeps_its_files(packed, unfinished, monkeypatch, capsys):
    (unfinished / "settings.json").unlink()
    assert main(monkeypatch, command(packed, unfinished, "--checkpoint-steps", "2")) == 2
    assert f"{unfinished} is not empty and has no settings.json" in capsys.readouterr().err
    assert list((unfinished / "checkpoints").iterdir())


def begin(packed: Path, out: Path) -> None:
    Run(out).begin(load_settings([]), read_manifest(packed)).close()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_held_lock_is_recognised_by_every_error_code(packed, tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    with pytest.raises(RunError, match="is being trained by another process"):
        begin(packed, tmp_path / "run")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_missing_support_for_locks_is_reported(packed, tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(fcntl, "flock", refusing(code))
    begin(packed, tmp_path / "run")
    assert f"cannot be locked ({os.strerror(code)})" in capsys.readouterr().err


def test_a_lock_whose_owner_cannot_be_read_still_holds(packed, tmp_path, monkeypatch):
    for name in ("write", "ftruncate"):
        monkeypatch.setattr(run_module.os, name, refusing(errno.ENOSPC))
    begin(packed, tmp_path / "run")


def test_a_lock_that_cannot_be_closed_does_not_fail_a_finished_run(packed, tmp_path, monkeypatch):
    """This is what happens on a mount that was lost during the run."""
    out = tmp_path / "run"
    with Storage(tmp_path, Fault(Call("close", "run/.lock"), 1, "ENOTCONN", lasting=True)) as storage:
        assert main(monkeypatch, command(packed, out)) == 0
    assert storage.hits == 1
    assert (out / "report.md").exists()
