"""Worker processes on this machine, with one BLAS thread each; their failures are reported in one line."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from pipeline.output import secure

_EXIT_REFUSED = 75  # exit code of a worker that cannot start a thread; EX_TEMPFAIL in sysexits.h
_QUIET_SECONDS = 60.0  # minimum time between two lines of `say`
# Without these, BLAS would start a thread per core in each worker, for products that are too small for it.
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_REFUSED = "the system allows no more processes or threads"
_RAISE = "raise the limit (ulimit -u, --pids-limit, podPidsLimit)"


class WorkersError(RuntimeError):
    """Workers cannot be started, or one died; the message says why and what to do."""


class _Worker(SpawnProcess):
    """A worker that ignores the signals which reach all processes of a terminal: the command handles them."""

    def start(self) -> None:
        added = [name for name in _THREADS if name not in os.environ]
        os.environ.update(dict.fromkeys(added, "1"))  # read when the worker imports numpy
        try:
            with _terminal_signals_blocked():
                super().start()
        except OSError as error:
            raise WorkersError(_refusal(error.strerror or str(error))) from None
        finally:
            for name in added:
                del os.environ[name]


@contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    """Block the signals of Ctrl-C and of a lost terminal, also for processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(SpawnContext):
    """Spawns processes, as this one has threads and must not fork; keeps them, to say how one ended."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *args, **settings) -> _Worker:  # type: ignore[override]  # noqa: N802
        self.started.append(_Worker(*args, **settings))
        return self.started[-1]

    def kill(self) -> None:
        for process in self.started:
            if process.pid is not None:
                process.kill()


@contextmanager
def pool(
    count: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Start `count` processes, each of which first calls the initializer.

    Raises WorkersError if the system refuses them, or if one dies.
    """
    context, refused = _Spawn(), threading.Event()
    with _interrupted_without_threads(refused):
        try:
            first = (shared_array("d", 1), initializer, *arguments)
            with ProcessPoolExecutor(count, context, _start, first) as executor:
                try:
                    yield executor
                except BaseException as error:
                    if _is_about_threads(error):
                        refused.set()
                    if (
                        refused.is_set()
                        or isinstance(error, WorkersError)
                        or not isinstance(error, Exception)
                    ):
                        context.kill()  # do not wait for them to finish their work
                    raise
        except BrokenProcessPool:  # the pool has shut down, so all exit codes are known
            raise WorkersError(_end(context.started)) from None
        except (RuntimeError, KeyboardInterrupt):
            if not refused.is_set():
                raise
            raise WorkersError(_refusal("can't start new thread")) from None


def shared_array(kind: str, length: int) -> Any:
    """Make an array that all workers share, for a pool's initializer. Raises WorkersError like `pool`."""
    try:
        with _terminal_signals_blocked():  # the first array starts a process that tracks shared resources
            return multiprocessing.get_context("spawn").Array(kind, length)
    except BlockingIOError as error:
        raise WorkersError(_refusal(error.strerror or str(error))) from None


@contextmanager
def _interrupted_without_threads(refused: threading.Event) -> Iterator[None]:
    """Interrupt the main thread if the pool cannot start a thread, as the pool would then never end."""

    def interrupt(failure: threading.ExceptHookArgs) -> None:
        if _is_about_threads(failure.exc_value):
            refused.set()
            interrupt_main()
        else:
            before(failure)

    before, threading.excepthook = threading.excepthook, interrupt
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def refused_threads() -> Iterator[None]:
    """Raise WorkersError if the system refuses this process a thread in the block."""
    try:
        yield
    except RuntimeError as error:
        if not _is_about_threads(error):
            raise
        raise WorkersError(f"{_REFUSED} ({error}): {_RAISE}") from None


def _is_about_threads(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and "can't start new thread" in str(error)


def _refusal(reason: str) -> str:
    return f"{_REFUSED} ({reason}): try fewer --workers, or {_RAISE}"


def _end(started: Sequence[SpawnProcess]) -> str:
    """Describe how the first process to die ended; the pool ends the others by SIGTERM."""
    codes = [process.exitcode for process in started]
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), -signal.SIGTERM)
    if code == _EXIT_REFUSED:
        return _refusal("a worker can't start a thread")
    if code == -signal.SIGKILL:
        how = "was killed (SIGKILL), probably because memory ran out: try fewer --workers"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a worker process {how}"


def _start(said: Any, initializer: Callable[..., None] | None, *arguments: Any) -> None:
    global _said
    secure()
    _said = said
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    except RuntimeError:
        os._exit(_EXIT_REFUSED)
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    """End this worker when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Array(list):
    """Stands in for a shared array in a process without a pool."""

    def get_lock(self) -> threading.Lock:
        return _lock


_lock = threading.Lock()
_said: Any = _Array([0.0])  # monotonic time of the last line of `say`; workers of a pool share it


def say(text: str) -> None:
    """Report a problem that may pass on stderr: at most one line per minute from all workers of a pool."""
    with _said.get_lock():
        now = time.monotonic()
        if _said[0] and now - _said[0] < _QUIET_SECONDS:
            return
        _said[0] = now
    print(f"{Path(sys.argv[0]).stem}: {text}", file=sys.stderr, flush=True)


def end_at_signals() -> None:
    """Exit with code 128 + N on signal N, SIGTERM or SIGHUP.

    A container's first process ignores SIGTERM unless it has a handler. SIGHUP stays ignored if it was, as
    under nohup.
    """

    def end(number: int, _frame: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell repeats what its terminal has sent
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)
