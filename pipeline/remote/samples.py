"""Fetch single samples by ranges of their shards, each checked against its own checksum.

This is for the first steps of a run, which need a few samples of many shards, for hosts that need only a
small part of each shard, and for what is left of a shard that does not match its checksum.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.manifest import DatasetError
from pipeline.remote.cache import RemoteShard
from pipeline.remote.counters import Counters
from pipeline.remote.requests import ClosedError, LostError, Requests
from pipeline.shards import checksum

CONNECTIONS = 16
START_BYTES = 256 << 20  # of samples that are fetched before their shards, besides the share of all bytes
_SHARE = 8  # the part of what is fetched that goes to such samples, as a divisor: shards should not be slowed
_FETCHES = 3  # of a sample that does not match its checksum, after which it counts as damaged
_IDLE_SECONDS = 10.0  # after which a thread without work looks whether it should end
_HELD_BYTES = 512 << 20  # of samples that no batch has taken yet


class Range(NamedTuple):
    """Where the file of a sample is. checksum: the first bytes of its SHA-256."""

    url: str
    offset: int
    size: int
    checksum: bytes


class Samples:
    """Fetches samples in threads of its own.

    changed: the lock of all attributes; it is notified when a sample has arrived. found: the bytes of each
    sample, or why it cannot be had, as a predicate. problem: why requests can never succeed, if that is so.
    """

    def __init__(self, requests: Requests, counters: Counters, changed: threading.Condition):
        self.requests, self.counters, self.changed = requests, counters, changed
        self.found: dict[Range, bytes | str] = {}
        self.problem: Exception | None = None
        self.bytes_requested = 0
        self._waiting: deque[Range] = deque()
        self._known: set[Range] = set()  # those that are waiting, being fetched, or found
        self._threads: list[threading.Thread] = []

    def request(self, ranges: Iterable[Range]) -> None:
        """Have samples fetched, unless they have been requested. The lock must be held."""
        for part in ranges:
            if part not in self._known:
                self._known.add(part)
                self._waiting.append(part)
                self.bytes_requested += part.size
        self._start()
        self.changed.notify_all()

    def forget(self, part: Range) -> None:
        """Drop a sample that is no longer needed, unless it is on its way."""
        if self.found.pop(part, None) is not None:
            self._known.discard(part)

    def is_known(self, part: Range) -> bool:
        """Return whether a sample has been requested, and not been taken."""
        return part in self._known

    @property
    def room(self) -> int:
        """The number of bytes that may be requested without slowing the shards down."""
        held = sum(part.size for part in self._known)
        allowed = START_BYTES + self.counters.bytes_fetched // _SHARE - self.bytes_requested
        return min(allowed, _HELD_BYTES - held)

    def take(self, part: Range) -> bytes | str | None:
        """Return what has been found of a sample, and forget it, or None if it has not arrived."""
        if part in self.found:
            self._known.discard(part)
        return self.found.pop(part, None)

    def _start(self) -> None:
        while len(self._threads) < min(CONNECTIONS, len(self._waiting)):
            thread = threading.Thread(target=self._work, name="sample fetcher", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while not self.requests.closed.is_set():
            with self.changed:
                if not self._waiting:
                    self.changed.wait(_IDLE_SECONDS)
                    continue
                part = self._waiting.popleft()
            try:
                found = self._fetch(part)
            except ClosedError:
                return
            except (DatasetError, OSError) as error:
                with self.changed:
                    self.problem = error
                    self._known.discard(part)
                    self.changed.notify_all()
                continue
            with self.changed:
                self.found[part] = found
                self.changed.notify_all()

    def _fetch(self, part: Range) -> bytes | str:
        """Return the bytes of a sample, or why it cannot be had."""
        for _ in range(_FETCHES):
            try:
                data = self.requests.read(part.url, part.offset, part.size)
            except LostError as error:
                return str(error)
            with self.changed:
                self.counters.bytes_fetched += len(data)
                self.counters.samples_by_range += 1
            if checksum(data) == part.checksum:
                return data
        return "does not match its checksum"


class SplitRanges:
    """The samples of a split as ranges of its shards.

    rows: the split's index. shards: None for those that are local. checksums: [samples, bytes]. always:
    whether all samples are fetched so, because this machine needs only a small part of each shard.
    """

    def __init__(
        self, samples: Samples, rows: np.ndarray, shards: Sequence[RemoteShard | None], checksums: np.ndarray
    ):
        self.samples, self.rows, self.shards, self.checksums = samples, rows, shards, checksums
        self.always = False

    def part(self, number: int) -> Range:
        """Return where a sample is, by number."""
        index, offset, size, *_ = self.rows[number].tolist()
        shard = self.shards[index]
        assert shard is not None
        return Range(shard.url, offset, size, self.checksums[number].tobytes())

    def request(self, numbers: Iterable[int], unlimited: bool = False) -> list[int]:
        """Request samples, and return those that must wait for their shards. The lock must be held.

        unlimited: whether none must, because their shards will not arrive.
        """
        room = None if self.always or unlimited else self.samples.room
        wanted, refused = [], []
        for number in numbers:
            part = self.part(number)
            if self.samples.is_known(part):
                continue
            if room is not None and (room := room - part.size) < 0:
                refused.append(number)
            else:
                wanted.append(part)
        if wanted:
            self.samples.request(wanted)
        return refused
