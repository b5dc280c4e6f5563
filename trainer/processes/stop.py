"""Record requests to stop a run; the training loop then saves a checkpoint and stops after a step."""

import signal
from types import FrameType, TracebackType
from typing import Self

from pipeline.manifest import DatasetError

_REPEATABLE = (signal.SIGHUP, signal.SIGUSR1)
SIGNALS = (signal.SIGTERM, signal.SIGINT, *_REPEATABLE)


class Stopped(Exception):  # noqa: N818 – not an error
    """Raised after a run that was asked to stop has saved its checkpoint."""

    def __init__(self, by: signal.Signals):
        super().__init__(f"stopped by {by.name}")
        self.exit_code = 128 + by  # as a shell reports a process ended by a signal


class WaitEndedError(DatasetError):
    """The run was asked to stop while a batch waited for storage, so this batch will not come."""


class StopRequest:
    """A context that records the first signal of each of SIGNALS instead of letting it end the process.

    A second SIGTERM or SIGINT has its usual effect. The two are counted separately because Ctrl-C sends
    SIGINT to torchrun and its processes, and torchrun then sends SIGTERM to the processes as well. A second
    SIGHUP is ignored, because both a closed terminal and its shell send one, and so is a second SIGUSR1, by
    which a batch system announces that it will end the job. If one of these two was ignored before, as SIGHUP
    is under nohup, it stays ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.error: Exception | None = None  # another reason to stop, set by the code that detects it

    @property
    def is_made(self) -> bool:
        """Whether a signal has arrived or an error has been set."""
        return self.signal is not None or self.error is not None

    def __enter__(self) -> Self:
        ignored = [number for number in _REPEATABLE if signal.getsignal(number) == signal.SIG_IGN]
        recorded = [number for number in SIGNALS if number not in ignored]
        self._previous = {number: signal.signal(number, self._record) for number in recorded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_IGN if number in _REPEATABLE else self._previous[self.signal])
