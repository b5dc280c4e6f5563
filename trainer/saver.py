"""Save checkpoints while training goes on: copy the state to host memory, and write the copy in a thread."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pipeline.files import path_in_errors
from pipeline.retry import with_retries
from trainer import checkpoint
from trainer.monitor.metrics import Metrics
from trainer.run import Run, RunError
from trainer.settings import Settings

RETRY_SECONDS = 300.0  # time after which a failed save is tried again


class Copier:
    """Copies states into host memory that is reused for each state, and page-locked if there is a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple, Tensor] = {}

    def copy(self, state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
        """Begin to copy a state to host memory, overwriting the previous copy.

        Returns the copy, and a function that waits until it is complete and returns the seconds that the
        device took. On a GPU, the copy is queued after the steps so far and before later ones.
        """
        if not torch.cuda.is_initialized():
            return self._copied(state, ()), lambda: 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        copied = self._copied(state, ())
        end.record()

        def wait() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return copied, wait

    def _copied(self, value: Any, path: tuple) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copied(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        memory = self._memory.get(path)
        if memory is None:
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._memory[path] = memory
        return memory.copy_(value, non_blocking=True)


class _Unsaved(NamedTuple):
    """A copied state that has not been written to the disk yet."""

    state: dict[str, Any]
    best: bool


class Saver:
    """Saves the states of a run, one at a time.

    A failed save is reported with `warn`, counted, and tried again after RETRY_SECONDS. The best state is
    kept until it has been written, and is written before any other, because a run that resumes from a later
    state relies on the best one being on the disk. Leaving the context waits for a save in progress, except
    after Ctrl-C.
    """

    def __init__(self, run: Run, settings: Settings, metrics: Metrics, warn: Callable[[str], None]):
        self.run, self.keep = run, settings.keep_checkpoints
        self.metrics, self.warn = metrics, warn
        self._seconds = settings.checkpoint_seconds or math.inf
        self._due = time.monotonic() + self._seconds
        self._copier = Copier()
        self._unsaved: list[_Unsaved] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._reported = False  # whether the failure has been reported
        self._undeleted: list[str] = []  # messages about old files that could not be deleted
        self._reported_undeleted: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            return
        try:
            self.drain()
        except RunError as unsaved:
            self.warn(str(unsaved))

    def save(self, state: dict[str, Any], best: bool = False) -> None:
        """Copy a state and begin to write it, after waiting for any save that is still in progress.

        best: whether the state has the lowest validation error so far. Raises as `report_failures` does.
        """
        begun = time.monotonic()
        self._wait()
        self.report_failures()
        self._unsaved = [unsaved for unsaved in self._unsaved if unsaved.best and not best]
        if self._unsaved:
            self._copier = Copier()  # the old one's memory holds the unsaved best state
        started = time.monotonic()
        copied, wait_for_copy = self._copier.copy(state)
        self._unsaved.append(_Unsaved(copied, best))
        self._due = started + self._seconds
        paused = time.monotonic() - begun

        def write() -> None:
            self.metrics.checkpoint_stall_seconds.observe(paused + wait_for_copy())
            self._write_unsaved(started)

        self._thread = threading.Thread(target=self._attempt, args=(write,), name="saver", daemon=True)
        self._thread.start()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save, because of --checkpoint-seconds or to retry a failed save."""
        return time.monotonic() >= self._due

    def wait_for_newest(self) -> Path | None:
        """Wait for a save in progress, and return the path of the newest checkpoint, if any.

        Returns the folder of the checkpoints instead if it cannot be listed.
        """
        self._wait()
        try:
            return next(iter(checkpoint.list_checkpoints(self.run.checkpoints, "step")), None)
        except OSError:
            return self.run.checkpoints

    def drain(self) -> None:
        """Wait for a save in progress, and retry a failed one, for some seconds if that may help.

        Raises RunError if it still fails; a further call does not raise it again.
        """
        self._wait()
        if isinstance(self._failure, RunError):
            started = time.monotonic()
            self._attempt(lambda: with_retries(lambda: self._write_unsaved(started), self.warn))
        self._report_undeleted()
        failure, self._failure = self._failure, None
        if isinstance(failure, RunError):
            raise RunError(
                f"{failure}. Fix this and run the same command again: "
                "the run continues from its last checkpoint"
            )
        if failure is not None:
            raise failure

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def report_failures(self) -> None:
        """Warn once of each failed save and of each old file that cannot be deleted.

        Raises an error of the saving thread that the storage did not cause.
        """
        self._report_undeleted()
        if isinstance(self._failure, RunError):
            if not self._reported:
                retry = f"training goes on, and saving is tried again within {RETRY_SECONDS / 60:.0f} minutes"
                self.warn(f"{self._failure}: {retry}")
                self._reported = True
        elif self._failure is not None:
            raise self._failure

    def _report_undeleted(self) -> None:
        """Warn of each old file that could not be deleted, once per file."""
        while self._undeleted:
            line = self._undeleted.pop(0)
            if line not in self._reported_undeleted:
                self.warn(line)
                self._reported_undeleted.add(line)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Call `write`, and keep its error for the training thread."""
        try:
            write()
        except OSError as error:
            path = checkpoint.path_of(self.run.checkpoints, self._unsaved[0].state["step"])
            reason = error.strerror or str(error)
            if error.filename and Path(error.filename).parent != path.parent:
                reason = f"{reason}: {error.filename}"
            self.metrics.checkpoint_failures.inc()
            self._due = min(self._due, time.monotonic() + RETRY_SECONDS)
            self._reported = False
            self._failure = RunError(f"the checkpoint {path} cannot be written: {reason}")
        except Exception as error:
            self._failure = error
        else:
            self._failure = None

    def _write_unsaved(self, started: float) -> None:
        """Write all unsaved states. Raises OSError if one cannot be written; it then stays unsaved."""
        self.run.sync()
        while self._unsaved:
            state, best = self._unsaved[0]
            folder, step = self.run.checkpoints, state["step"]
            with path_in_errors(checkpoint.path_of(folder, step)):
                size, undeleted = checkpoint.write(folder, step, state, self.keep, best)
            self._undeleted += undeleted
            del self._unsaved[0]
            self.metrics.checkpoint_bytes.set(size)
            self.metrics.checkpoint_timestamp.set(state["time"])
        self.metrics.checkpoint_seconds.observe(time.monotonic() - started)
