"""Saving during training: which state is saved, in which order, and what happens when the disk fails."""

import errno
import os
import pickle
import resource
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from trainer import checkpoint
from trainer.monitor.metrics import Metrics
from trainer.run import Run, RunError, Table
from trainer.saver import RETRY_SECONDS, Saver
from trainer.settings import Settings

CPU = torch.device("cpu")


class Setup:
    """A saver of a run in a folder, with its metrics and its warnings."""

    def __init__(self, folder, **settings):
        self.metrics, self.warnings = Metrics(), []
        self.run = Run(folder)
        self.saver = Saver(self.run, Settings(**settings), self.metrics, self.warnings.append)

    def sample(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"alexnet_checkpoint_{name}")

    def steps(self) -> list[int]:
        return [int(path.stem[5:]) for path in checkpoint.list_checkpoints(self.run.checkpoints, "step")]


@pytest.fixture
def made(tmp_path) -> Callable[..., Setup]:
    return lambda **settings: Setup(tmp_path, **settings)


def state(step: int, value: float = 0.0) -> dict:
    weights = torch.full((200, 100), value)
    return {"step": step, "time": 1e9 + step, "model": {"weight": weights}, "errors": [0.5], "optimizer": []}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_saved_state_is_that_of_the_time_of_saving(made, monkeypatch):
    """Training continues in the same memory before the thread has begun to write, twice."""
    may_write, write = threading.Semaphore(0), checkpoint.write
    setup = made(keep_checkpoints=2)

    def when_told(*given):
        assert may_write.acquire(timeout=30), setup.warnings  # released once per save
        return write(*given)

    monkeypatch.setattr(checkpoint, "write", when_told)
    for step in (1, 2):
        training = state(step, value=step)
        setup.saver.save(training)
        training["model"]["weight"].zero_()
        training["errors"].append(0.1)
        may_write.release()
        setup.saver.drain()
    for path in checkpoint.list_checkpoints(setup.run.checkpoints):
        loaded = torch.load(path, weights_only=True)
        assert loaded["model"]["weight"].unique().tolist() == [loaded["step"]]
        assert loaded["errors"] == [0.5]
    assert setup.steps() == [2, 1]


def test_a_save_waits_for_the_previous_one_and_that_counts_as_a_stall(made, monkeypatch):
    writing, write = threading.Lock(), checkpoint.write
    slow = threading.Event()

    def one_at_a_time(*given):
        assert writing.acquire(blocking=False)
        slow.wait(0.3)
        size = write(*given)
        writing.release()
        return size

    monkeypatch.setattr(checkpoint, "write", one_at_a_time)
    setup = made(keep_checkpoints=3)
    for step in (1, 2, 3):
        setup.saver.save(state(step))
    setup.saver.drain()
    assert setup.steps() == [3, 2, 1]
    assert setup.sample("stall_seconds_count") == setup.sample("seconds_count") == 3
    # Two waits of .3 s, less the time between the beginnings of a write and of the next save.
    assert setup.sample("stall_seconds_sum") >= 0.3
    assert setup.sample("timestamp_seconds") == 1e9 + 3
    assert setup.sample("bytes") == checkpoint.path_of(setup.run.checkpoints, 3).stat().st_size


def test_a_failed_save_is_reported_once_counted_and_retried(made, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("trainer.saver.time", SimpleNamespace(monotonic=lambda: now[0]))
    setup = made()
    setup.saver.save(state(1))
    setup.saver._wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", full)
        setup.saver.save(state(2))
        setup.saver._wait()
    setup.saver.report_failures()
    setup.saver.report_failures()
    assert not setup.saver.is_due
    (warning,) = setup.warnings
    assert (
        f"{checkpoint.path_of(setup.run.checkpoints, 2)} cannot be written: No space left on device"
        in warning
    )
    assert "training goes on" in warning
    assert setup.sample("failures_total") == 1
    assert setup.sample("timestamp_seconds") == 1e9 + 1
    now[0] = RETRY_SECONDS
    assert setup.saver.is_due
    setup.saver.save(state(3))
    setup.saver.drain()
    assert not setup.saver.is_due
    assert setup.steps() == [3, 1]


def test_a_run_whose_last_save_failed_ends_with_an_error(made, monkeypatch):
    monkeypatch.setattr(checkpoint, "write", full)
    setup = made()
    setup.saver.save(state(2))
    with pytest.raises(RunError, match=r"step-000000002.pt cannot be written: No space.*same command again"):
        setup.saver.drain()
    with setup.saver:
        pass  # the error is not raised again


def leave(saver: Saver, step: int, error: type[BaseException]) -> None:
    with saver:
        saver.save(state(step))
        raise error


def test_after_an_error_in_training_the_save_is_finished(made, monkeypatch):
    setup = made()
    with pytest.raises(ZeroDivisionError):
        leave(setup.saver, 1, ZeroDivisionError)
    assert setup.steps() == [1]
    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(ZeroDivisionError):
        leave(setup.saver, 2, ZeroDivisionError)
    assert "step-000000002.pt cannot be written" in setup.warnings[-1]


def test_ctrl_c_does_not_wait_for_a_disk_that_hangs(made, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *_: hangs.wait())
    setup = made()
    with pytest.raises(KeyboardInterrupt):
        leave(setup.saver, 1, KeyboardInterrupt)
    hangs.set()
    setup.saver._wait()  # its thread must not write by the next test's `write`


def test_saves_are_due_by_the_clock(made, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("trainer.saver.time", SimpleNamespace(monotonic=lambda: now[0]))
    setup, never = made(checkpoint_seconds=600), made()
    due = []
    for now[0] in (599.0, 600.0, 1199.0, 1201.0):
        due.append(setup.saver.is_due)
        if due[-1]:
            setup.saver.save(state(int(now[0])))
        assert not never.saver.is_due
    assert due == [False, True, False, True]
    setup.saver.drain()


def test_an_error_that_the_disk_did_not_cause_ends_the_training(made):
    setup = made()
    setup.saver.save(state(1) | {"model": {"weight": lambda: None}})
    setup.saver._wait()
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        setup.saver.report_failures()


def test_rows_wait_until_the_disk_has_room(tmp_path):
    table = Table(tmp_path / "metrics.csv")
    table.append({"step": 1, "loss": 0.5})
    before = table.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, hard))  # room for three bytes of a row
    try:
        for step in (2, 3):
            table.append({"step": step, "loss": 0.5})
        with pytest.raises(OSError, match="large"):
            table.sync()
        assert table.path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    table.append({"step": 4, "loss": 0.5})
    table.sync()
    assert [row["step"] for row in table.rows()] == [1, 2, 3, 4]


def test_a_checkpoint_is_saved_after_the_rows_up_to_it(made, monkeypatch):
    setup = made()
    with monkeypatch.context() as patch:
        patch.setattr(Table, "_write", full)
        row = {"step": 1, "epoch": 0.1, "loss": 0.5, "error": 0.9, "images_per_second": 8.0}
        setup.run.metrics.append(row)
        setup.saver.save(state(1))
        with pytest.raises(RunError, match="No space left"):
            setup.saver.drain()
    assert setup.steps() == []
    setup.saver.save(state(1))
    setup.saver.drain()
    assert [row["step"] for row in setup.run.metrics.rows()] == [1]
    assert setup.steps() == [1]
