"""Fetch shards into the cache by several connections, the most urgent ones first."""

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.manifest import DatasetError
from pipeline.remote.cache import Cache, CacheFullError, Partial, RemoteShard
from pipeline.remote.counters import Counters
from pipeline.remote.priorities import Priorities
from pipeline.remote.requests import MISMATCH, ClosedError, LostError, Requests

CONNECTIONS = 8
PART_BYTES = 8 << 20  # size of a request
_FETCHES = 3  # of a shard that does not match its checksum, after which it counts as lost
_IDLE_SECONDS = 1.0  # after which threads without work look again: other processes fetch and evict, too
_CLOSE_SECONDS = 2.0  # how long to wait for threads to end: a request cannot be interrupted


@dataclass
class _Download:
    """A shard that is being fetched, in parts.

    offsets: of the parts that nobody fetches yet. missing: number of parts that have not been written.
    users: number of threads that fetch a part. is_given_up: whether it is to be discarded, once they have
    ended.
    """

    shard: RemoteShard
    partial: Partial
    offsets: deque[int] = field(default_factory=deque)
    missing: int = 0
    users: int = 0
    is_given_up: bool = False

    def begin(self) -> None:
        """Have all parts fetched."""
        self.offsets.extend(range(0, self.shard.record.bytes, PART_BYTES))
        self.missing = len(self.offsets)

    def take(self) -> int:
        """Return the offset of the next part, which the caller fetches."""
        self.users += 1
        return self.offsets.popleft()


class Fetcher:
    """Fetches shards in threads of its own, until it is closed.

    changed: the lock of everything that the threads share; it is notified when a shard has arrived or is
    lost. lost: why shards are not fetched any more, as predicates, by path. problems: why they cannot be had
    at present.
    """

    def __init__(self, cache: Cache, requests: Requests, counters: Counters, priorities: Priorities):
        self.cache, self.requests, self.counters, self.priorities = cache, requests, counters, priorities
        self.changed = threading.Condition(threading.RLock())
        self.lost: dict[Path, str] = {}
        self.problems: dict[Path, Exception] = {}
        self._downloads: dict[Path, _Download] = {}
        self._mismatches: Counter[Path] = Counter()
        self._idle_until = 0.0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads, unless they run."""
        if self._threads:
            return
        for number in range(CONNECTIONS):
            thread = threading.Thread(target=self._work, name=f"fetcher {number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wake(self) -> None:
        """Have the threads look for work now. The lock must be held."""
        self._idle_until = 0.0
        self.changed.notify_all()

    def retry_lost(self, paths: Set[Path]) -> None:
        """Have shards fetched once more that were lost. The lock must be held."""
        for path in self.lost.keys() & paths:
            del self.lost[path]
        self.wake()

    def close(self) -> None:
        """End the threads, and delete what is incomplete."""
        self.requests.closed.set()
        with self.changed:
            self.changed.notify_all()
            for download in list(self._downloads.values()):
                self._give_up(download, ClosedError())
                if not download.users:
                    download.partial.discard()
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while not self.requests.closed.is_set():
            with self.changed:
                part = self._next_part()
                if part is None:
                    self.changed.wait(_IDLE_SECONDS)
                    continue
            download, offset = part
            try:
                self._fetch_part(download, offset)
            except (ClosedError, LostError, DatasetError, OSError) as error:
                with self.changed:
                    self._give_up(download, error)
            finally:
                with self.changed:
                    download.users -= 1
                    if download.is_given_up and not download.users:
                        download.partial.discard()

    def _next_part(self) -> tuple[_Download, int] | None:
        """Return what to fetch next, or None if there is nothing, or no room for it."""
        for download in self._downloads.values():
            if download.offsets:
                return download, download.take()
        if time.monotonic() < self._idle_until:
            return None
        started = self._start_download()
        if started is not None:
            return started, started.take()
        self._idle_until = time.monotonic() + _IDLE_SECONDS / 2
        return None

    def _start_download(self) -> _Download | None:
        """Begin with the most urgent shard that no process is fetching, if there is room for it."""
        for shard, room in self.priorities.order():
            if shard.path in self._downloads or shard.path in self.lost:
                continue
            try:
                partial = self.cache.begin(shard.path, shard.record.bytes, room)
            except (CacheFullError, OSError) as error:
                self.problems[shard.path] = error
                return None
            self.problems.pop(shard.path, None)
            if partial is not None:
                download = self._downloads[shard.path] = _Download(shard, partial)
                download.begin()
                return download
            if shard.path.exists():
                self._arrived(shard.path)
        return None

    def _fetch_part(self, download: _Download, offset: int) -> None:
        """Fetch a part, and publish the shard if it was the last one."""
        shard = download.shard
        data = self.requests.read(shard.url, offset, min(PART_BYTES, shard.record.bytes - offset))
        with self.changed:
            self.counters.bytes_fetched += len(data)
            if download.is_given_up:
                return
        download.partial.write(data, offset)
        with self.changed:
            download.missing -= 1
            if download.missing or download.is_given_up:
                return
        matches = download.partial.publish(shard.record.sha256)
        with self.changed:
            if matches:
                self._downloads.pop(shard.path, None)
                self._mismatches.pop(shard.path, None)
                self.counters.shards_fetched += 1
                self._arrived(shard.path)
                return
            self._mismatches[shard.path] += 1
            if self._mismatches[shard.path] >= _FETCHES:
                raise LostError(MISMATCH)
            self.requests.count_retry()
            download.begin()

    def _arrived(self, path: Path) -> None:
        self.priorities.present.add(path)
        self.changed.notify_all()

    def _give_up(self, download: _Download, error: Exception) -> None:
        download.is_given_up = True
        download.offsets.clear()
        self._downloads.pop(download.shard.path, None)
        if isinstance(error, LostError):
            self.lost[download.shard.path] = str(error)
        elif not isinstance(error, ClosedError):
            self.problems[download.shard.path] = error
            self._idle_until = time.monotonic() + _IDLE_SECONDS
        self.changed.notify_all()


def warn(text: str) -> None:
    """Print a message to stderr at once."""
    print(f"alexnet-train: {text}", file=sys.stderr, flush=True)
