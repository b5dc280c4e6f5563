"""Ends a process that makes no progress, so that a supervisor starts the run again.

A hang has three forms, and one of them stops all Python: a call into C that never returns and keeps the
interpreter's lock, such as one into a device's driver. So there are two watches. A thread looks at the
time since the last progress; it says what stalled, writes the stacks of all threads, and ends the process
with EXIT_STALLED. Each time it looks, it also puts off faulthandler's timer, a thread of C that needs no
lock: if the watching thread is held up itself, that timer writes the stacks and ends the process with 1.

A rank that hangs holds up the others in their next collective, where each one's own watchdog ends it.
"""

import faulthandler
import math
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports torch
    from trainer.monitor.metrics import Metrics

EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h: it failed, and may succeed when tried again
START_SECONDS = 1800.0  # at least, until the first interval is logged: tuning, calibration, compilation
UNHEALTHY_SHARE = 2 / 3  # of the time that is allowed, after which /healthz says so
GRACE_SECONDS = 10.0  # by which faulthandler's timer comes later
_STDERR = 2  # by number: sys.stderr may be locked by the thread that hangs


def allowed_seconds(metrics: "Metrics", stall_seconds: float) -> float:
    """How long the run may be without progress as things stand; for ever with stall_seconds=0."""
    if not stall_seconds:
        return math.inf
    return stall_seconds if metrics.history else max(stall_seconds, START_SECONDS)


class Watchdog:
    """Watches from a thread until closed. rank: of this process, to be named."""

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
            f"alexnet-train: rank {self.rank} has made no progress for {stalled:.0f} s, in: {doing}. It ends "
            "here; the same command continues after the last checkpoint. All its threads:\n"
        )
        os.write(_STDERR, line.encode())
        faulthandler.dump_traceback(file=_STDERR)
        os._exit(EXIT_STALLED)

    def _left(self) -> float:
        return allowed_seconds(self.metrics, self.stall_seconds) - self.metrics.stalled_seconds()
