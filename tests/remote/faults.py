"""The faults of requests that tests order: of which kind, for which objects, and when."""

import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATUSES = {  # kind → status, code and message of S3's answer
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
KINDS = (
    *STATUSES,
    "reset",  # instead of an answer
    "reset in body",
    "stall",  # in the body, and then a reset
    "truncated",  # the connection is closed before all announced bytes were sent
    "short",  # fewer bytes than the client asked for are announced and sent
    "wrong bytes",  # one byte of the body is inverted
)


@dataclass(frozen=True)
class Fault:
    """A fault of one request. kind: one of KINDS. place: 0 to 1, where in the body it happens."""

    kind: str
    place: float = 0.5

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


class Faults:
    """The faults that are still to be injected. injected: the number of the others, by kind."""

    def __init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._single: list[tuple[str, Fault]] = []
        self._random: list[Fault] = []
        self._ratio, self._path, self._rng = 0.0, "", np.random.default_rng(0)

    @property
    def pending(self) -> int:
        """The number of faults that were ordered and have not been injected yet."""
        return len(self._single) + len(self._random)

    def fail(self, kind: str, path: str = "", times: int = 1, place: float = 0.5) -> None:
        """Give a fault to each of the next `times` GET requests whose path matches the pattern `path`."""
        with self._lock:
            self._single += [(path, Fault(kind, place))] * times

    def fail_at_random(
        self, seed: int, count: int, ratio: float, kinds: Sequence[str] = KINDS, path: str = ""
    ) -> None:
        """Give faults to a share `ratio` of the GET requests whose path matches `path`, `count` in all.

        Kinds are equally frequent. The seed determines the faults, their order, and how many requests lie
        between them.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(count)
        faults = [Fault(kinds[number % len(kinds)], rng.uniform()) for number in order]
        with self._lock:
            self._random, self._ratio, self._path, self._rng = faults, ratio, path, rng

    def take_fault(self, path: str) -> Fault | None:
        """Return the fault of a new GET request, or None."""
        with self._lock:
            fault = self._take(path)
            if fault is not None:
                self.injected[fault.kind] += 1
            return fault

    def _take(self, path: str) -> Fault | None:
        for index, (pattern, fault) in enumerate(self._single):
            if re.search(pattern, path):
                del self._single[index]
                return fault
        if self._random and re.search(self._path, path) and self._rng.uniform() < self._ratio:
            return self._random.pop()
        return None
