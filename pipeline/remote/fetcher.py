"""Fetch shards into the cache by several connections, the most urgent ones first."""

import threading
import time
from collections import Counter
from collections.abc import Set
from pathlib import Path

from pipeline.manifest import DatasetError
from pipeline.remote.cache import Cache, CacheFullError, RemoteShard, Room
from pipeline.remote.counters import Counters
from pipeline.remote.download import Download
from pipeline.remote.priorities import Priorities
from pipeline.remote.requests import MISMATCH, ClosedError, LostError, Requests

CONNECTIONS = 8
# Sizes of a request. On a slow link, parts are short, so that few samples are fetched by themselves although
# they are on their way; on a fast one, latency counts less the longer the parts are.
LEAST_PART_BYTES, PART_BYTES = 256 << 10, 8 << 20
_PART_SECONDS = 0.5
_REQUEST_SECONDS = 0.03  # what a request takes besides its bytes, roughly
_FIRST_RATE = 5e5  # bytes per second of a connection, before any has been measured
_WAIT_SECONDS = 5.0  # for bytes that another thread fetches, before they are fetched once more
_OPEN = 64  # the number of incomplete shards up to which samples may begin further ones
_FETCHES = 3  # of a shard that does not match its checksum, after which it counts as lost
_IDLE_SECONDS = 1.0  # after which threads without work look again: other processes fetch and evict, too
_CLOSE_SECONDS = 2.0  # how long to wait for threads to end: a request cannot be interrupted


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
        self._downloads: dict[Path, Download] = {}
        self._rate = _FIRST_RATE
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

    def read_through(self, url: str, start: int, stop: int) -> bytes | None:
        """Return bytes of a shard that is wanted, and keep them, with the rest of their blocks, in its file.

        Returns None if they cannot be kept. Raises FatalError and ClosedError.
        """
        with self.changed:
            download = self._join(url)
            if download is None:
                return None
            part = download.part_with(start, stop)
        failure = None
        try:
            if part is not None:
                self._fetch(download, part)
            with self.changed:
                self.changed.wait_for(lambda: download.is_over or download.has(start, stop), _WAIT_SECONDS)
                if not download.has(start, stop):
                    return None
            return download.partial.read(start, stop - start)
        except LostError:
            return None
        except OSError as error:
            failure = error
            return None
        finally:
            self._leave(download, failure)

    def is_here(self, url: str) -> bool:
        """Return whether a wanted shard has arrived, so that it can be opened now or once it is checked."""
        with self.changed:
            shard = self.priorities.wanted_shard(url)
            if shard is None:
                return False
            download = self._downloads.get(shard.path)
            return download.is_complete if download is not None else shard.path.exists()

    def distrust(self, url: str, start: int, stop: int) -> None:
        """Have bytes of a shard that is not complete fetched again, because they are damaged."""
        with self.changed:
            shard = self.priorities.wanted_shard(url)
            download = self._downloads.get(shard.path) if shard is not None else None
            if download is not None and not download.is_complete:
                download.distrust(start, stop)

    def _join(self, url: str) -> Download | None:
        """Begin to use the download of a wanted shard, which is begun if it can be; None if it cannot."""
        shard = self.priorities.wanted_shard(url)
        if shard is None or shard.path in self.priorities.present or shard.path in self.lost:
            return None
        download = self._downloads.get(shard.path)
        if download is None and len(self._downloads) < _OPEN:
            try:
                download = self._begin(shard, self.priorities.room)
            except (CacheFullError, OSError):
                return None
        if download is None or download.is_complete:
            return None
        download.users += 1
        return download

    def _work(self) -> None:
        while not self.requests.closed.is_set():
            with self.changed:
                found = self._next_part()
                if found is None:
                    self.changed.wait(_IDLE_SECONDS)
                    continue
            download, part = found
            begun, failure = time.monotonic(), None
            try:
                self._fetch(download, part)
            except (ClosedError, LostError, DatasetError, OSError) as error:
                failure = error
            self._leave(download, failure)
            if len(part) >= LEAST_PART_BYTES:  # or it was latency that took most of the time
                self._rate = len(part) / (time.monotonic() - begun)

    def _next_part(self) -> tuple[Download, range] | None:
        """Return what to fetch next, or None if there is nothing, or no room for it."""
        demanded = self.priorities.demanded
        for download in sorted(self._downloads.values(), key=lambda each: each.shard.path not in demanded):
            if part := self._part_of(download):
                return download, part
        if time.monotonic() < self._idle_until:
            return None
        started = self._start_download()
        if started is not None and (part := self._part_of(started)):
            return started, part
        self._idle_until = time.monotonic() + _IDLE_SECONDS / 2
        return None

    def _part_of(self, download: Download) -> range | None:
        """Return the next part of a download, which this thread uses from now on; None if there is none."""
        limit = min(PART_BYTES, max(LEAST_PART_BYTES, int(self._rate * _PART_SECONDS)))
        part = download.next_part(limit, int(self._rate * _REQUEST_SECONDS))
        if part is not None:
            download.users += 1
        return part

    def _start_download(self) -> Download | None:
        """Begin with the most urgent shard that no process is fetching, if there is room for it."""
        for shard, room in self.priorities.order():
            if shard.path in self._downloads or shard.path in self.lost:
                continue
            try:
                download = self._begin(shard, room)
                is_there = download is None and shard.path.exists()
            except (CacheFullError, OSError) as error:
                self.problems[shard.path] = error
                return None
            self.problems.pop(shard.path, None)
            if download is not None:
                return download
            if is_there:
                self._arrived(shard.path)
        return None

    def _begin(self, shard: RemoteShard, room: Room) -> Download | None:
        """Begin to fetch a shard, unless it is there, another process fetches it, or this one ends.

        Raises as `Cache.begin` does.
        """
        if self.requests.closed.is_set():
            return None
        partial = self.cache.begin(shard.path, shard.record.bytes, room)
        if partial is None:
            return None
        download = self._downloads[shard.path] = Download(shard, partial)
        self.wake()
        return download

    def _fetch(self, download: Download, part: range) -> None:
        """Fetch a part into the file. Raises as `Requests.read` does, and OSError if it cannot be written."""
        try:
            data = self.requests.read(download.shard.url, part.start, len(part))
            with self.changed:
                self.counters.bytes_fetched += len(data)
            download.partial.write(data, part.start)
            with self.changed:
                download.arrived(part)
        finally:
            with self.changed:
                download.release(part)
                self.changed.notify_all()

    def _leave(self, download: Download, failure: Exception | None = None) -> None:
        """End this thread's use of a download. The last one publishes it if it is complete, and discards it
        if it has been given up.
        """
        with self.changed:
            if failure is not None:
                self._give_up(download, failure)
            if download.users > 1 or download.is_over or not download.is_complete:
                download.users -= 1
                if download.is_over and not download.users:
                    download.partial.discard()
                return
        try:
            self._publish(download)
        except (LostError, OSError) as error:
            failure = error
        self._leave(download, failure)

    def _publish(self, download: Download) -> None:
        """Give a shard its name, or have it fetched again if it does not match its checksum."""
        shard = download.shard
        matches = download.partial.publish(shard.record.sha256)
        with self.changed:
            if matches:
                download.is_over = True
                self._downloads.pop(shard.path, None)
                self._mismatches.pop(shard.path, None)
                self.counters.shards_fetched += 1
                self._arrived(shard.path)
                return
            self._mismatches[shard.path] += 1
            if self._mismatches[shard.path] >= _FETCHES:
                raise LostError(MISMATCH)
            self.requests.count_retry()
            download.restart()

    def _arrived(self, path: Path) -> None:
        self.priorities.present.add(path)
        self.changed.notify_all()

    def _give_up(self, download: Download, error: Exception) -> None:
        download.is_over = True
        self._downloads.pop(download.shard.path, None)
        if isinstance(error, LostError):
            self.lost[download.shard.path] = str(error)
        elif not isinstance(error, ClosedError):
            self.problems[download.shard.path] = error
            self._idle_until = time.monotonic() + _IDLE_SECONDS
        self.changed.notify_all()
