"""Record requests to stop a run; the training loop then saves a checkpoint and stops after a step."""

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from pipeline.manifest import DatasetError

# A repeated signal is part of the same request for so many seconds; later, it has its usual effect. Slurm
# sends SIGTERM twice within milliseconds, a closed terminal and its shell both send SIGHUP, and by SIGUSR1 a
# batch system announces that it will end the job.
REPEAT_SECONDS = {signal.SIGTERM: 1.0, signal.SIGINT: 0.0, signal.SIGHUP: math.inf, signal.SIGUSR1: math.inf}
SIGNALS = tuple(REPEAT_SECONDS)


class Stopped(Exception):  # noqa: N818 – not an error
    """Raised after a run that was asked to stop has saved its checkpoint."""

    def __init__(self, by: signal.Signals):
        super().__init__(f"stopped by {by.name}")
        self.exit_code = 128 + by  # as a shell reports a process ended by a signal


class WaitEndedError(DatasetError):
    """The run was asked to stop while a batch waited for storage, so this batch will not come."""


class StopRequest:
    """A context that records the first signal of each of SIGNALS instead of letting it end the process.

    A second SIGTERM or SIGINT has its usual effect, unless it is part of the same request (REPEAT_SECONDS).
    The two are counted separately because Ctrl-C sends SIGINT to torchrun and its processes, and torchrun
    then sends SIGTERM to the processes as well. If SIGHUP or SIGUSR1 was ignored before, as SIGHUP is under
    nohup, it stays ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.error: Exception | None = None  # another reason to stop, set by the code that detects it
        self._times: dict[int, float] = {}  # when each signal arrived first

    @property
    def is_made(self) -> bool:
        """Whether a signal has arrived or an error has been set."""
        return self.signal is not None or self.error is not None

    def __enter__(self) -> Self:
        may_stay_ignored = (signal.SIGHUP, signal.SIGUSR1)
        ignored = [number for number in may_stay_ignored if signal.getsignal(number) == signal.SIG_IGN]
        recorded = [number for number in SIGNALS if number not in ignored]
        self._previous = {number: signal.signal(number, self._record) for number in recorded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if number not in self._times:
            self.signal, self._times[number] = received, now
        elif now - self._times[number] >= REPEAT_SECONDS[received]:
            signal.signal(number, self._previous[received])
            signal.raise_signal(number)
