"""End a process that makes no progress, so that a supervisor can restart the run.

One form of hang stops all Python code: a call into C that never returns and holds the interpreter's lock, for
example into a device's driver. Hence there are two watchdogs. A thread checks the time since the last
progress; after a stall, it prints what stalled and the stacks of all threads, and ends the process with
EXIT_STALLED. At each check, it also postpones faulthandler's timer, which runs in C and does not need the
lock: if the thread itself is blocked, that timer prints the stacks and ends the process with exit code 1.

A rank that hangs blocks the others in their next collective, where each is ended by its own watchdog.
"""

import faulthandler
import math
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch
    from trainer.monitor.metrics import Metrics

EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure; a retry may succeed
START_SECONDS = 1800.0  # minimum until the first interval is logged, for tuning, calibration and compilation
UNHEALTHY_SHARE = 2 / 3  # of the allowed time, after which /healthz reports the stall
GRACE_SECONDS = 10.0  # by which faulthandler's timer fires later
_STDERR = 2  # the file descriptor; sys.stderr may be locked by the thread that hangs


def allowed_seconds(metrics: "Metrics", stall_seconds: float) -> float:
    """Return how long the run may currently go without progress; infinite with stall_seconds=0."""
    if not stall_seconds:
        return math.inf
    return stall_seconds if metrics.history else max(stall_seconds, START_SECONDS)


class Watchdog:
    """Watches from a thread until closed. rank: that of this process, for its messages."""

    def __init__(self, metrics: "Metrics", stall_seconds: float, rank: int):
        self.metrics, self.stall_seconds, self.rank = metrics, stall_seconds, rank
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

        if stall_seconds:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self.stall_seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        left = self._left()
        while left > 0:
            faulthandler.dump_traceback_later(left + GRACE_SECONDS, exit=True, file=_STDERR)
            if self._closed.wait(min(left, self.stall_seconds / 10)):
                return
            left = self._left()
        stalled, doing = self.metrics.stalled_seconds(), self.metrics.doing
        line = (
            f"alexnet-train: rank {self.rank} has made no progress for {stalled:.0f} s during {doing}. It "
            "ends now: run the same command again to continue from the last checkpoint. All its threads:\n"
        )
        with suppress(OSError):  # the process ends even if nobody can be told why
            os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(file=_STDERR)
        os._exit(EXIT_STALLED)

    def _left(self) -> float:
        return allowed_seconds(self.metrics, self.stall_seconds) - self.metrics.stalled_seconds()
