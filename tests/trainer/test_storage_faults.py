"""Storage that fails for a while: no good checkpoint is lost, and what is missing is reported."""

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.endurance.faulty_storage import Call, Fault, Storage
from trainer import checkpoint
from trainer.checkpoint import list_checkpoints, load, write
from trainer.monitor.metrics import Metrics
from trainer.run import Run, RunError
from trainer.saver import Saver
from trainer.settings import Settings

CPU = torch.device("cpu")
FOR_EVER = 1000  # calls


def state(step: int) -> dict[str, Any]:
    return {"step": step, "time": 1e9 + step, "model": {"weight": torch.full((1000,), float(step))}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def failing(monkeypatch) -> Callable[..., list[str]]:
    """Make a function fail if its arguments contain part of a path; return the paths that failed."""

    def fail(owner: object, call: str, part: str, code: int, times: int = 1) -> list[str]:
        real, failed = getattr(owner, call), []

        def answer(*arguments: Any, **options: Any) -> Any:
            path = next((str(given) for given in arguments if part in str(given)), None)
            if path is not None and len(failed) < times:
                failed.append(path)
                raise OSError(code, os.strerror(code), path)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, call, answer, raising=False)
        return failed

    monkeypatch.setattr(checkpoint, "open", builtins.open, raising=False)
    return fail


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EIO, errno.EACCES])
def test_a_link_that_cannot_be_renamed_does_not_harm_the_file_it_names(tmp_path, failing, code):
    failed = failing(Path, "replace", "/step-", code)
    write(tmp_path, 1, state(1), keep=1, best=True)
    assert len(failed) == 1
    assert names(tmp_path) == ["best-000000001.pt", "step-000000001.pt"]
    for kind in ("best", "step"):
        assert load(tmp_path, CPU, kind)[0]["step"] == 1


def test_a_link_left_by_a_killed_process_is_not_written_to(tmp_path, failing):
    write(tmp_path, 1, state(1), 1, best=True)
    (tmp_path / ".step-000000002.pt.link.partial").hardlink_to(tmp_path / "best-000000001.pt")
    failing(Path, "unlink", ".partial", errno.EPERM, FOR_EVER)
    write(tmp_path, 2, state(2), 3, best=True)
    assert [load(tmp_path, CPU, kind)[0]["step"] for kind in ("best", "step")] == [2, 2]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, failing):
    write(tmp_path, 1, state(1), keep=2)
    failing(Path, "iterdir", tmp_path.name, errno.ESTALE)
    assert load(tmp_path, CPU)[0]["step"] == 1
    failing(Path, "iterdir", tmp_path.name, errno.EACCES, FOR_EVER)
    with pytest.raises(OSError, match="Permission denied") as error:
        load(tmp_path, CPU)
    assert error.value.filename == str(tmp_path)


def test_a_file_that_is_listed_twice_counts_once(tmp_path, monkeypatch):
    iterdir = Path.iterdir
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda folder: iter(2 * list(iterdir(folder))))
        for step in (1, 2, 3):
            write(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["step-000000002.pt", "step-000000003.pt"]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_checkpoint_that_is_briefly_unreadable_is_still_loaded(tmp_path, failing, capsys, code):
    for step in (1, 2):
        write(tmp_path, step, state(step), keep=2)
    failed = failing(checkpoint, "read_file", "step-000000002", code, times=2)
    loaded, skipped = load(tmp_path, CPU)
    assert (loaded["step"], skipped, len(failed)) == (2, [], 2)
    assert capsys.readouterr().err.count("step-000000002.pt: " + os.strerror(code)) == 1


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_stays_unreadable_is_not_skipped(tmp_path, failing, code):
    for step in (1, 2):
        write(tmp_path, step, state(step), keep=2)
    failing(checkpoint, "read_file", "step-000000002", code, FOR_EVER)
    reason = f"step-000000002.pt cannot be read: {os.strerror(code)}.*may be intact"
    with pytest.raises(RunError, match=reason):
        load(tmp_path, CPU)


@pytest.mark.parametrize("error", ["EAGAIN", "ESTALE", "EIO"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_brief_read_error_is_not_taken_for_damage(tmp_path, error, number):
    for step in (1, 2):
        write(tmp_path, step, state(step), keep=2)
    fault = Fault(Call("read", "step-000000002.pt"), number, error, lasting=False)
    with Storage(tmp_path, fault) as storage:
        loaded, skipped = load(tmp_path, CPU)
    assert (loaded["step"], skipped, storage.hits) == (2, [], 1)


def test_an_error_while_reading_names_the_file(tmp_path, monkeypatch):
    write(tmp_path, 1, state(1), keep=1)

    def unreadable(_file: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_verify", unreadable)
    with pytest.raises(RunError, match=r"step-000000001.pt cannot be read: Input/output error"):
        load(tmp_path, CPU)


@pytest.mark.parametrize("kind", ["step", "best"])
def test_a_good_checkpoint_is_not_deleted_by_a_run_that_resumed_before_it(tmp_path, kind):
    for step in (1, 9):
        write(tmp_path, step, state(step), keep=2, best=kind == "best" and step == 9)
    write(tmp_path, 2, state(2), keep=1)
    assert load(tmp_path, CPU, kind)[0]["step"] == 9


def test_a_damaged_checkpoint_is_kept_while_it_cannot_be_read(tmp_path, failing):
    for step in (1, 9):
        write(tmp_path, step, state(step), keep=2)
    list_checkpoints(tmp_path)[0].write_bytes(b"")
    failing(checkpoint, "open", "step-000000009", errno.EIO)
    write(tmp_path, 2, state(2), keep=1)
    assert names(tmp_path) == ["step-000000002.pt", "step-000000009.pt"]
    write(tmp_path, 3, state(3), keep=1)
    assert names(tmp_path) == ["step-000000003.pt"]


def test_a_checkpoint_deleted_by_the_trainer_before_it_is_read_is_replaced_by_the_next(tmp_path, monkeypatch):
    write(tmp_path, 1, state(1), keep=1)
    loaded, calls = checkpoint._load_file, []

    def saved_meanwhile(path: Path, device: torch.device) -> dict[str, Any]:
        if not calls:
            write(tmp_path, 2, state(2), keep=1)
        calls.append(path)
        return loaded(path, device)

    monkeypatch.setattr(checkpoint, "_load_file", saved_meanwhile)
    assert load(tmp_path, CPU)[0]["step"] == 2
    assert len(calls) == 2


def test_a_checkpoint_is_saved_even_if_nothing_can_be_deleted(tmp_path, failing):
    write(tmp_path, 1, state(1), keep=1, best=True)
    failing(Path, "unlink", ".pt", errno.EPERM, FOR_EVER)
    _, left = write(tmp_path, 2, state(2), keep=1, best=True)
    assert left == [
        f"{tmp_path}/{name}-000000001.pt cannot be deleted: Operation not permitted"
        for name in ("best", "step")
    ]
    assert load(tmp_path, CPU, "best")[0]["step"] == 2


def test_a_checkpoint_is_saved_even_if_its_folder_cannot_be_listed_afterwards(tmp_path, monkeypatch):
    write(tmp_path, 1, state(1), keep=1)

    def unlisted(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "list_checkpoints", unlisted)
        _, left = write(tmp_path, 2, state(2), keep=1)
    assert left == [f"{tmp_path} cannot be listed to delete old checkpoints: Input/output error"]
    assert load(tmp_path, CPU)[0]["step"] == 2


def test_a_checkpoint_is_saved_even_if_fadvise_is_not_supported(tmp_path, monkeypatch):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "posix_fadvise", unknown)
    write(tmp_path, 1, state(1), keep=1)
    assert load(tmp_path, CPU)[0]["step"] == 1


class Saving:
    """A saver whose writes fail while `broken`.

    It records its warnings, and the steps that it has written, each with whether it is the best.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.warnings: list[str] = []
        self.written: list[tuple[int, bool]] = []
        self.broken, self.write = True, checkpoint.write
        self.folder = folder / "checkpoints"
        self.saver = Saver(Run(folder), Settings(keep_checkpoints=9), Metrics(), self.warnings.append)
        monkeypatch.setattr(checkpoint, "write", self)

    def __call__(self, folder: Path, step: int, state: dict[str, Any], keep: int, best: bool) -> Any:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.written.append((step, best))
        return self.write(folder, step, state, keep, best)

    def save(self, step: int, best: bool = False) -> None:
        """Save a state that training changes as soon as it is copied."""
        training = state(step)
        self.saver.save(training, best)
        training["model"]["weight"].zero_()
        self.saver._wait()


@pytest.fixture
def saving(tmp_path, monkeypatch) -> Saving:
    return Saving(tmp_path, monkeypatch)


def test_a_best_state_that_could_not_be_saved_is_saved_before_the_next(saving):
    saving.save(1, best=True)
    saving.save(2)
    saving.broken = False
    saving.save(3)
    saving.saver.drain()
    assert saving.written == [(1, True), (3, False)]
    for step, kind in ((1, "best"), (3, "step")):
        model = load(saving.folder, CPU, kind)[0]["model"]
        assert model["weight"].unique().tolist() == [step]


def test_a_better_state_replaces_a_best_state_that_could_not_be_saved(saving):
    saving.save(1, best=True)
    saving.save(2)
    saving.broken = False
    saving.save(3, best=True)
    saving.saver.drain()
    assert saving.written == [(3, True)]


def test_no_later_state_is_saved_before_a_best_state_that_failed(saving):
    saving.save(1, best=True)
    saving.broken, write = False, saving.write

    def best_fails(folder: Path, step: int, *more: Any) -> Any:
        if step == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(folder, step, *more)

    saving.write = best_fails
    saving.save(2)
    with pytest.raises(RunError, match=r"step-000000001.pt cannot be written: Input/output error"):
        saving.saver.drain()
    assert list_checkpoints(saving.folder) == []


def test_the_last_save_of_a_run_is_retried_before_it_ends(saving, monkeypatch):
    monkeypatch.setattr("pipeline.retry.time.sleep", lambda _: setattr(saving, "broken", False))
    saving.save(1, best=True)
    saving.saver.drain()
    assert load(saving.folder, CPU, "best")[0]["step"] == 1


def test_a_file_that_cannot_be_deleted_is_reported_once_and_is_not_a_failure(saving, failing):
    saving.broken = False
    saving.saver.keep = 1
    failing(Path, "unlink", ".pt", errno.EPERM, FOR_EVER)
    for step in (1, 2, 3):
        saving.save(step)
    saving.saver.drain()
    assert [line.partition(" cannot")[0][-len("step-000000001.pt") :] for line in saving.warnings] == [
        "step-000000001.pt",
        "step-000000002.pt",
    ]
    assert saving.saver.wait_for_newest().name == "step-000000003.pt"


def test_the_newest_checkpoint_is_given_by_its_folder_if_that_cannot_be_listed(saving, failing):
    saving.broken = False
    saving.save(1)
    failing(Path, "iterdir", "checkpoints", errno.EACCES, FOR_EVER)
    assert saving.saver.wait_for_newest() == saving.folder
