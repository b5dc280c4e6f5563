"""Request parts of files behind URLs, and wait with growing pauses while the storage fails.

A request is repeated until it succeeds, because a run must outlast an outage; whoever waits for its result
decides how long to wait. Only the absence of a file, or of a part of it, is final.
"""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock

from pipeline.duration import duration
from pipeline.manifest import DatasetError
from pipeline.remote.counters import Counters
from pipeline.remote_errors import host_of, redact
from pipeline.retry import StorageError
from pipeline.storage import file_system, read_once

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0  # seconds
_ATTEMPTS_UNSAID = 4  # a single error that passes is not worth a message
_SHORT_ANSWERS = 4  # in succession, after which a file counts as too short
MISMATCH = "does not match its checksum"  # a predicate, as those of LostError
_SHORT = "the answer ends too early"
_REFUSED = {"HTTP 401", "HTTP 403", "access denied"}
_GONE = {"HTTP 404", "HTTP 410", "HTTP 416", "not found"}


class LostError(Exception):
    """A file, or a part of it, is not in the storage. The message says so, as the predicate of a sentence."""


class FatalError(DatasetError):
    """A URL can never be read, because of what it is or how it is served."""


class ClosedError(Exception):
    """The requests have been given up."""


class Requests:
    """Makes the requests of a process from several threads.

    warn: called with a message when requests begin to fail repeatedly, and when none does any more.
    counters: where repeated requests are counted. problem: why one of them failed last, or an empty string.
    """

    def __init__(self, warn: Callable[[str], None], counters: Counters):
        self.warn, self.counters, self.problem = warn, counters, ""
        self.closed = Event()
        self._lock = Lock()
        self._failing: set[object] = set()  # the requests that have failed several times
        self._since = 0.0  # when the first of them did, by the monotonic clock

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file from `offset` on.

        Raises LostError if they do not exist, FatalError if the URL can never be read, and ClosedError.
        """
        request, attempt, short_answers = object(), 0, 0
        try:
            while not self.closed.is_set():
                try:
                    return self._attempt(url, offset, size)
                except OSError as error:
                    is_short = isinstance(error, StorageError) and error.reason == _SHORT
                    short_answers = short_answers + 1 if is_short else 0
                    if short_answers == _SHORT_ANSWERS:
                        raise LostError("ends too early") from None
                    wait = self._pause(error, attempt)
                    self._failed(request, error, attempt)
                self.closed.wait(wait)
                attempt += 1
            raise ClosedError
        finally:
            self._ended(request, url)

    def count_retry(self) -> None:
        """Count a request that is repeated because of what it brought."""
        with self._lock:
            self.counters.retries += 1

    def _attempt(self, url: str, offset: int, size: int) -> bytes:
        try:
            data = read_once(url, offset, size)
        except FileNotFoundError:
            raise LostError("is missing") from None
        except StorageError as error:
            if error.reason in _GONE:
                raise LostError(f"is missing ({error.reason})") from None
            if error.reason in _REFUSED:
                forget_connections(url)  # the next attempt looks up the credentials again
            elif not error.transient:
                raise FatalError(str(error)) from None
            raise
        if len(data) < size:
            raise StorageError(f"{redact(url)}: {_SHORT}", _SHORT)
        return data

    @staticmethod
    def _pause(error: OSError, attempt: int) -> float:
        asked = error.retry_after if isinstance(error, StorageError) else 0.0
        pause = min(_FIRST_PAUSE * 2 ** min(attempt, 30), _LONGEST_PAUSE) * random.uniform(0.5, 1)
        return max(pause, min(asked, _LONGEST_PAUSE))

    def _failed(self, request: object, error: OSError, attempt: int) -> None:
        with self._lock:
            self.counters.retries += 1
            self.problem = str(error)
            if attempt != _ATTEMPTS_UNSAID:
                return
            first = not self._failing
            self._failing.add(request)
            if first:
                self._since = time.monotonic()
        if first:
            self.warn(f"waiting for storage: {error}")

    def _ended(self, request: object, url: str) -> None:
        with self._lock:
            if request not in self._failing:
                return
            self._failing.remove(request)
            last = not self._failing
        if last and not self.closed.is_set():
            seconds = time.monotonic() - self._since
            self.warn(f"{host_of(url)}: no longer waiting for storage, after {duration(seconds)}")


def forget_connections(url: str) -> None:
    """Have the next request for a URL connect anew, with credentials that are looked up again."""
    with suppress(Exception):  # the request will say what is wrong
        fs, _ = file_system(url)
        type(fs).clear_instance_cache()
