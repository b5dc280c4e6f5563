"""Run worker processes on this machine, with one BLAS thread each, and explain their failures in one line."""

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

_EXIT_REFUSED = 75  # exit code of a worker that cannot start a thread: EX_TEMPFAIL of sysexits.h
_WARNING_SECONDS = 60.0  # shortest time between two warnings
# Otherwise, BLAS would start a thread per core in each worker, for products that are too small for it.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_REFUSED = "the system allows no more processes or threads"
_RAISE_LIMIT = "raise the limit (ulimit -u, --pids-limit, podPidsLimit)"


class WorkersError(RuntimeError):
    """Workers cannot be started, or one died; the message says why and what to do."""


class _Worker(SpawnProcess):
    """A worker that ignores what a terminal sends to all its processes; the parent handles these signals."""

    def start(self) -> None:
        added = [name for name in _THREAD_VARIABLES if name not in os.environ]
        os.environ.update(dict.fromkeys(added, "1"))  # the worker reads them when it imports NumPy
        try:
            with _terminal_signals_blocked():
                super().start()
        except OSError as error:
            raise WorkersError(_refusal_message(error.strerror or str(error))) from None
        finally:
            for name in added:
                del os.environ[name]


@contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    """Block the signals of Ctrl-C and of a closed terminal. A process that starts meanwhile inherits this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SpawnContext(SpawnContext):
    """Spawns processes, as forking is unsafe in a process with threads, and remembers those it started."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *args, **settings) -> _Worker:  # type: ignore[override]  # noqa: N802
        self.started.append(_Worker(*args, **settings))
        return self.started[-1]

    def kill(self) -> None:
        """Kill all processes that were started."""
        for process in self.started:
            if process.pid is not None:
                process.kill()


@contextmanager
def pool(
    count: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Provide an executor with `count` processes, each of which first calls the initializer.

    Raises WorkersError if the system refuses to start a process or thread, or if a process dies.
    """
    context, refused = _SpawnContext(), threading.Event()
    with _interrupt_if_threads_refused(refused):
        try:
            start_arguments = (shared_array("d", 1), initializer, *arguments)
            with ProcessPoolExecutor(count, context, _start_worker, start_arguments) as executor:
                try:
                    yield executor
                except BaseException as error:
                    if _is_thread_refusal(error):
                        refused.set()
                    if (
                        refused.is_set()
                        or isinstance(error, WorkersError)
                        or not isinstance(error, Exception)
                    ):
                        context.kill()  # do not wait for them to finish their work
                    raise
        except BrokenProcessPool:  # the pool has shut down, so all exit codes are known
            raise WorkersError(_describe_death(context.started)) from None
        except (RuntimeError, KeyboardInterrupt):
            if not refused.is_set():
                raise
            raise WorkersError(_refusal_message("can't start new thread")) from None


def shared_array(kind: str, length: int) -> Any:
    """Return an array of C type `kind` to share with workers by the initializer of a pool.

    Raises WorkersError if the system refuses to start a process.
    """
    try:
        with _terminal_signals_blocked():  # the first array starts Python's resource tracker, a process
            return multiprocessing.get_context("spawn").Array(kind, length)
    except BlockingIOError as error:
        raise WorkersError(_refusal_message(error.strerror or str(error))) from None


@contextmanager
def _interrupt_if_threads_refused(refused: threading.Event) -> Iterator[None]:
    """Interrupt the main thread if the pool cannot start a thread, because the pool would then never end."""

    def interrupt(failure: threading.ExceptHookArgs) -> None:
        if _is_thread_refusal(failure.exc_value):
            refused.set()
            interrupt_main()
        else:
            original_hook(failure)

    original_hook, threading.excepthook = threading.excepthook, interrupt
    try:
        yield
    finally:
        threading.excepthook = original_hook


@contextmanager
def translate_thread_errors() -> Iterator[None]:
    """Raise WorkersError instead of RuntimeError if the system refuses to start a thread in the block."""
    try:
        yield
    except RuntimeError as error:
        if not _is_thread_refusal(error):
            raise
        raise WorkersError(f"{_REFUSED} ({error}): {_RAISE_LIMIT}") from None


def _is_thread_refusal(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and "can't start new thread" in str(error)


def _refusal_message(reason: str) -> str:
    return f"{_REFUSED} ({reason}): try fewer --workers, or {_RAISE_LIMIT}"


def _describe_death(started: Sequence[SpawnProcess]) -> str:
    """Describe how the first process to die ended; the pool then ended the others by SIGTERM."""
    codes = [process.exitcode for process in started]
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), -signal.SIGTERM)
    if code == _EXIT_REFUSED:
        return _refusal_message("a worker can't start a thread")
    if code == -signal.SIGKILL:
        how = "was killed (SIGKILL), probably because memory ran out: try fewer --workers"
    else:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a worker process {how}"


def _start_worker(last_warning: Any, initializer: Callable[..., None] | None, *arguments: Any) -> None:
    global _last_warning
    secure()
    _last_warning = last_warning
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    except RuntimeError:
        os._exit(_EXIT_REFUSED)
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    """End this worker when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _UnsharedArray(list):
    """Has the interface of a shared array, for a process without a pool."""

    def get_lock(self) -> threading.Lock:
        return _lock


_lock = threading.Lock()
# The monotonic time of the last line of `warn`, which the workers of a pool share.
_last_warning: Any = _UnsharedArray([0.0])


def warn(text: str) -> None:
    """Warn on stderr of a temporary problem: at most one line per minute from all workers of a pool."""
    with _last_warning.get_lock():
        now = time.monotonic()
        if _last_warning[0] and now - _last_warning[0] < _WARNING_SECONDS:
            return
        _last_warning[0] = now
    command = Path(sys.argv[0]).stem.rpartition(" ")[2].replace("_", "-")  # alexnet-train NAME, or NAME.py
    print(f"{command}: {text}", file=sys.stderr, flush=True)


def exit_on_signals() -> None:
    """Exit with code 143 on SIGTERM and 129 on SIGHUP.

    A container's first process would ignore SIGTERM without a handler. SIGHUP stays ignored if it was, as
    under nohup.
    """

    def leave(number: int, _frame: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a shell repeats the one that its terminal sends
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, leave)
