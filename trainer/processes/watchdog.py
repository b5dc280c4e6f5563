"""End a process that makes no progress, so that a supervisor can restart the run.

There are two watchdogs. The first is a thread that checks the time since the last progress; after a stall, it
prints what stalled and the stacks of all threads, and ends the process with EXIT_STALLED. That thread cannot
run while a call into C, for example into a device's driver, holds the interpreter's lock. The second watchdog
is therefore the timer of `faulthandler`, which runs in C and needs no lock. The thread postpones it at each
check; if the thread is blocked, the timer prints the stacks and ends the process with exit code 1.

A process that hangs blocks the others in their next collective operation, where each is ended by its own
watchdog.
"""

import faulthandler
import math
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this module imports torch, which takes seconds
    from trainer.monitor.metrics import Metrics

EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure; a retry may succeed
START_UP_SECONDS = 1800.0  # minimum limit until the first log interval: tuning and compilation take time
UNHEALTHY_FRACTION = 2 / 3  # fraction of the time limit after which /healthz reports a stall
GRACE_SECONDS = 10.0  # how much later than the thread the timer of faulthandler acts
_STDERR = 2  # file descriptor; sys.stderr may be locked by the thread that hangs


def allowed_seconds(metrics: "Metrics", stall_seconds: float) -> float:
    """Return the current limit on the time without progress in seconds; it is infinite if stall_seconds=0."""
    if not stall_seconds:
        return math.inf
    return stall_seconds if metrics.history else max(stall_seconds, START_UP_SECONDS)


class Watchdog:
    """Watches this process from a thread until it is closed.

    stall_seconds: time limit without progress; 0 disables the watchdog. rank: rank of this process, for its
    message.
    """

    def __init__(self, metrics: "Metrics", stall_seconds: float, rank: int):
        self.metrics, self.stall_seconds, self.rank = metrics, stall_seconds, rank
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if stall_seconds:
            self._set_timer(self._remaining())  # a call into C may take the lock before the thread has it
            self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self.stall_seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        remaining = self._remaining()
        while remaining > 0:
            self._set_timer(remaining)
            if self._closed.wait(min(remaining, self.stall_seconds / 10)):
                return
            remaining = self._remaining()
        stalled, activity = self.metrics.stalled_seconds(), self.metrics.current_activity
        line = (
            f"alexnet-train: rank {self.rank} has made no progress for {stalled:.0f} s during {activity}. It "
            "ends now: run the same command again to continue from the last checkpoint. All its threads:\n"
        )
        with suppress(OSError):  # the process ends even if the reason cannot be written
            os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(file=_STDERR)
        os._exit(EXIT_STALLED)

    def _set_timer(self, remaining: float) -> None:
        faulthandler.dump_traceback_later(remaining + GRACE_SECONDS, exit=True, file=_STDERR)

    def _remaining(self) -> float:
        return allowed_seconds(self.metrics, self.stall_seconds) - self.metrics.stalled_seconds()
