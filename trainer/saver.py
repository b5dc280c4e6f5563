"""Saving beside the training: the state is copied, and a thread writes the copy."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from pipeline.files import naming
from pipeline.retry import patiently
from trainer import checkpoint
from trainer.monitor.metrics import Metrics
from trainer.run import Run, RunError
from trainer.settings import Settings

RETRY_SECONDS = 300.0  # after a save that failed


class Copier:
    """Copies states into memory of the host that serves again for the next one, page-locked beside a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple, Tensor] = {}

    def copy(self, state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
        """The state on the host, and what waits until it is there and returns the seconds the device took.

        On a GPU the copy stands in the queue, between the steps before it and those after it.
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

    def _copied(self, value: Any, place: tuple) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copied(item, (*place, number)) for number, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        memory = self._memory.get(place)
        if memory is None:
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._memory[place] = memory
        return memory.copy_(value, non_blocking=True)


class _Unsaved(NamedTuple):
    """A state that is to be written, in memory of its own."""

    state: dict[str, Any]
    best: bool


class Saver:
    """Saves the states of a run, one at a time.

    One that cannot be saved is said with `warn`, counted, and tried again after RETRY_SECONDS. The best one's
    state is kept until then, and none is written before it: a run that went on from a later one would count
    on the best to be there. Leaving the context waits for what is under way, but not after Ctrl-C.
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
        self._said = False  # that it failed
        self._left: list[str] = []  # lines about old files that could not be deleted
        self._said_left: set[str] = set()

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
        """Copy a state and begin to write it. best: whether to keep it until there is a better one.

        Waits for the save before, if that is still under way.
        """
        begun = time.monotonic()
        self._wait()
        self._report()
        self._unsaved = [unsaved for unsaved in self._unsaved if unsaved.best and not best]
        if self._unsaved:
            self._copier = Copier()  # the memory of the one before holds it
        started = time.monotonic()
        copied, copying = self._copier.copy(state)
        self._unsaved.append(_Unsaved(copied, best))
        self._due = started + self._seconds
        held = time.monotonic() - begun

        def write() -> None:
            self.metrics.checkpoint_stall_seconds.observe(held + copying())
            self._write_unsaved(started)

        self._thread = threading.Thread(target=self._attempt, args=(write,), name="saver", daemon=True)
        self._thread.start()

    def is_due(self) -> bool:
        """Whether to save by the clock, or to try again what failed, which is said here."""
        self._report()
        return time.monotonic() >= self._due

    def newest(self) -> Path | None:
        """The newest checkpoint, that under way included; their folder while it cannot be listed."""
        self._wait()
        try:
            return next(iter(checkpoint.saved(self.run.checkpoints, "step")), None)
        except OSError:
            return self.run.checkpoints

    def drain(self) -> None:
        """Wait until nothing is under way. A save that failed is tried again, for some seconds where that may
        help. Raises RunError, once, if it fails still."""
        self._wait()
        if isinstance(self._failure, RunError):
            started = time.monotonic()
            self._attempt(lambda: patiently(lambda: self._write_unsaved(started), self.warn))
        self._say_left()
        failure, self._failure = self._failure, None
        if isinstance(failure, RunError):
            raise RunError(
                f"{failure}. Mend it and give the same command again: "
                "the run continues from its last checkpoint"
            )
        if failure is not None:
            raise failure

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self) -> None:
        """Warn of a save that failed, if it has not been said. Raises what is not the disk's fault."""
        self._say_left()
        if isinstance(self._failure, RunError):
            if not self._said:
                again = f"training goes on, and it is tried again within {RETRY_SECONDS / 60:.0f} minutes"
                self.warn(f"{self._failure}: {again}")
                self._said = True
        elif self._failure is not None:
            raise self._failure

    def _say_left(self) -> None:
        """Warn, once, of each old file that could not be deleted."""
        while self._left:
            line = self._left.pop(0)
            if line not in self._said_left:
                self.warn(line)
                self._said_left.add(line)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write, in the thread or at the end, and keep the error for the training thread."""
        try:
            write()
        except OSError as error:
            path = checkpoint.path_of(self.run.checkpoints, self._unsaved[0].state["step"])
            reason = error.strerror or str(error)
            if error.filename and Path(error.filename).parent != path.parent:
                reason = f"{reason}: {error.filename}"
            self.metrics.checkpoint_failures.inc()
            self._due = min(self._due, time.monotonic() + RETRY_SECONDS)
            self._said = False
            self._failure = RunError(f"the checkpoint {path} cannot be written: {reason}")
        except Exception as error:
            self._failure = error
        else:
            self._failure = None

    def _write_unsaved(self, started: float) -> None:
        """Raises OSError; what was not written by then stays unsaved."""
        self.run.sync()
        while self._unsaved:
            state, best = self._unsaved[0]
            folder, step = self.run.checkpoints, state["step"]
            with naming(checkpoint.path_of(folder, step)):
                size, left = checkpoint.write(folder, step, state, self.keep, best)
            self._left += left
            del self._unsaved[0]
            self.metrics.checkpoint_bytes.set(size)
            self.metrics.checkpoint_timestamp.set(state["time"])
        self.metrics.checkpoint_seconds.observe(time.monotonic() - started)
