"""Fetch single samples by ranges of their shards, each checked against its own checksum.

This is for the first steps of a run, which need a few samples of many shards, for hosts that need only a
small part of each shard, and for what is left of a shard that does not match its checksum. What arrives of a
shard that is wanted as a whole is kept in its file (pipeline/remote/fetcher.py).
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from pipeline.manifest import DatasetError, Split
from pipeline.remote.cache import RemoteShard
from pipeline.remote.fetcher import Fetcher
from pipeline.remote.requests import MISMATCH, ClosedError, LostError
from pipeline.shards import checksum, read_checksums

CONNECTIONS = 16
START_BYTES = 256 << 20  # of samples that come again with their shards, besides the share of all bytes
_SHARE = 8  # the part of what is fetched that such samples may be, as a divisor: shards should not be slowed
_FETCHES = 3  # of a sample that does not match its checksum, after which it counts as damaged
_IDLE_SECONDS = 10.0  # after which a thread without work looks whether it should end
_HELD_BYTES = 512 << 20  # of samples that no batch has taken yet
# Largest gap between two samples that are fetched by one request. It takes .3 ms on a link of 200 MB/s,
# whereas 16 connections with a latency of 50 ms complete a request every 3 ms.
_GAP_BYTES = 64 << 10
_REQUEST_BYTES = 2 << 20  # largest size of such a request


class Range(NamedTuple):
    """Where the file of a sample is. checksum: the first bytes of its SHA-256."""

    url: str
    offset: int
    size: int
    checksum: bytes

    @property
    def end(self) -> int:
        return self.offset + self.size


class Samples:
    """Fetches samples in threads of its own, and those that are near each other by one request.

    changed: the lock of all attributes; it is notified when a sample has arrived. found: the bytes of each
    sample, or why it cannot be had, as a predicate. problem: why requests can never succeed, if that is so.
    """

    def __init__(self, fetcher: Fetcher):
        self.fetcher, self.changed = fetcher, fetcher.changed
        self.requests, self.counters = fetcher.requests, fetcher.counters
        self.found: dict[Range, bytes | str] = {}
        self.problem: Exception | None = None
        self.bytes_unkept = 0  # which come again with their shards
        self._waiting: deque[list[Range]] = deque()
        self._known: set[Range] = set()  # those that are waiting, being fetched, or found
        self._threads: list[threading.Thread] = []

    def request(self, ranges: Iterable[Range]) -> None:
        """Have samples fetched, unless they have been requested. The lock must be held."""
        new = set(ranges) - self._known
        self._known |= new
        self._waiting.extend(_neighbours(new))
        self._start()
        self.changed.notify_all()

    def forget(self, part: Range) -> None:
        """Drop a sample that is not needed any more."""
        self._known.discard(part)
        self.found.pop(part, None)

    def forget_failures(self) -> None:
        """Drop what has been found of samples that cannot be had, so that they are fetched again."""
        for part in [part for part, found in self.found.items() if isinstance(found, str)]:
            self.forget(part)

    @property
    def is_idle(self) -> bool:
        """Whether no sample is known: all that were requested have been taken or dropped."""
        return not self._known

    def is_known(self, part: Range) -> bool:
        """Return whether a sample has been requested, and not been taken."""
        return part in self._known

    @property
    def room(self) -> int:
        """The number of bytes that may be requested without slowing the shards down."""
        held = sum(part.size for part in self._known)
        allowed = START_BYTES + self.counters.bytes_fetched // _SHARE - self.bytes_unkept
        return min(allowed, _HELD_BYTES - held)

    def take(self, part: Range) -> bytes | str | None:
        """Return what has been found of a sample, and forget it, or None if it has not arrived."""
        found = self.found.get(part)
        if found is not None:
            self.forget(part)
        return found

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
                group = [part for part in self._waiting.popleft() if part in self._known]
            try:
                found = self._fetch(group) if group else {}
            except ClosedError:
                return
            except (DatasetError, OSError) as error:
                with self.changed:
                    self.problem = error
                    self._known.difference_update(group)
                    self.changed.notify_all()
                continue
            with self.changed:
                if found is None:
                    self._known.difference_update(group)
                else:
                    self.found |= {part: found[part] for part in group if part in self._known}
                self.changed.notify_all()

    def _fetch(self, group: list[Range]) -> dict[Range, bytes | str] | None:
        """Return the bytes of each sample of a group, or why it cannot be had.

        Returns None if their shard has arrived meanwhile: its reader opens it.
        """
        url, start, stop = group[0].url, group[0].offset, group[-1].end
        data = self.fetcher.read_through(url, start, stop)
        if data is None:
            if self.fetcher.is_here(url):
                return None
            found = self._read(group)
        else:
            found = self._matching(group, data)
            for part in group:
                if part not in found:
                    self.fetcher.distrust(url, part.offset, part.end)
        for _ in range(_FETCHES - 1):
            for part in group:
                if part not in found:
                    self.requests.count_retry()
                    found |= self._read([part])
        return dict.fromkeys(group, MISMATCH) | found

    def _read(self, group: list[Range]) -> dict[Range, bytes | str]:
        """Request samples together, and return those that match their checksums.

        Of a sample that is requested alone, returns why it is not in the storage, if that is so.
        """
        start = group[0].offset
        try:
            data = self.requests.read(group[0].url, start, group[-1].end - start)
        except LostError as error:
            return {group[0]: str(error)} if len(group) == 1 else {}
        with self.changed:
            self.counters.bytes_fetched += len(data)
            self.bytes_unkept += len(data)
        return self._matching(group, data)

    def _matching(self, group: list[Range], data: bytes) -> dict[Range, bytes | str]:
        """Return the samples that match their checksums. data: from the first one to the last."""
        start, found = group[0].offset, dict[Range, bytes | str]()
        for part in group:
            content = data[part.offset - start : part.end - start]
            if checksum(content) == part.checksum:
                found[part] = content
        with self.changed:
            self.counters.samples_by_range += len(found)
        return found


def _neighbours(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Group ranges of the same file that are near each other, each group in the order of the file."""
    group: list[Range] = []
    for part in sorted(ranges):
        if group and (
            part.url != group[-1].url
            or part.offset > group[-1].end + _GAP_BYTES
            or part.end > group[0].offset + _REQUEST_BYTES
        ):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


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

    @classmethod
    def of(
        cls,
        samples: Samples,
        rows: np.ndarray,
        shards: Sequence[RemoteShard | None],
        splits: Sequence[tuple[Path, Split]],
    ) -> Self | None:
        """Return the samples of a split, or None if a dataset has no checksums of them.

        splits: the folders of the datasets, and their records of the split.
        """
        found = [read_checksums(root, split) for root, split in splits]
        checksums = [each for each in found if each is not None]
        return cls(samples, rows, shards, np.concatenate(checksums)) if len(checksums) == len(found) else None

    def part(self, number: int) -> Range:
        """Return where a sample is, by number."""
        index, offset, size, *_ = self.rows[number].tolist()
        shard = self.shards[index]
        assert shard is not None
        return Range(shard.url, offset, size, self.checksums[number].tobytes())

    def forget(self, numbers: Iterable[int]) -> None:
        """Drop samples that have been read, from wherever they came."""
        if self.samples.is_idle:
            return
        with self.samples.changed:
            for number in numbers:
                self.samples.forget(self.part(number))

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
