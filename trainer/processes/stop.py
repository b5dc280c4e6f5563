"""Stop a run on request: a signal is noted, and the loop saves and leaves at the end of the current step."""

import signal
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 – not an error
    """Raised after a run that was asked to stop has saved its checkpoint."""

    def __init__(self, by: signal.Signals):
        super().__init__(f"stopped by {by.name}")
        self.exit_code = 128 + by  # as a shell reports a process ended by a signal


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGHUP while entered; a second of the same kind acts as usual.

    The kinds are counted separately because torchrun responds to Ctrl-C, which also reaches its processes,
    by sending them SIGTERM. Further SIGHUPs are ignored, because a shell repeats the one that its terminal
    has sent, and SIGHUP is ignored altogether if it was before, as under nohup.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.error: Exception | None = None  # another reason to stop, set by the code that finds it

    @property
    def is_made(self) -> bool:
        return self.signal is not None or self.error is not None

    def __enter__(self) -> Self:
        heeded = [n for n in SIGNALS if (n, signal.getsignal(n)) != (signal.SIGHUP, signal.SIG_IGN)]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        once = number != signal.SIGHUP
        signal.signal(number, self._before[self.signal] if once else signal.SIG_IGN)
