"""The storage of a process's datasets: the cache, the threads that fill it, and waiting for them."""

import time
import weakref
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from pipeline.files import atomic_write, read_file
from pipeline.locations import inside, name_of
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, write_manifest
from pipeline.output import say
from pipeline.reader import OutageError
from pipeline.remote.cache import Cache, CacheFullError, RemoteShard, locked
from pipeline.remote.counters import Counters
from pipeline.remote.fetcher import Fetcher
from pipeline.remote.options import CacheOptions
from pipeline.remote.priorities import Priorities
from pipeline.remote.requests import FatalError, Requests
from pipeline.remote.samples import Samples
from pipeline.remote_errors import redact
from pipeline.retry import with_retries
from pipeline.storage import read_once

# For how long a batch waits without a byte from the storage; less than --stall-seconds.
OUTAGE_SECONDS = 600.0
_FULL_SECONDS = 30.0  # for how long it waits for room in the cache, which another process may make
_POLL_SECONDS = 0.5


class Releasing(Protocol):
    """A reader, which holds shards open."""

    def release(self) -> None:
        """Close the shards that are not needed soon, if this is the thread that reads them."""


class RemoteStorage:
    """Mirrors datasets behind URLs into the cache.

    on_wait: called about twice a second while a batch waits, so that a watchdog knows that this is no hang.
    counters: what has been fetched. Raises OSError if the cache's folder cannot be used.
    """

    def __init__(self, options: CacheOptions):
        self.counters, self.priorities = Counters(), Priorities()
        requests = Requests(say, self.counters)
        self.cache = Cache(options, partial(_evicted, self.counters, self.priorities))
        self.fetcher = Fetcher(self.cache, requests, self.counters, self.priorities)
        self.samples = Samples(self.fetcher)
        self.readers: weakref.WeakSet[Releasing] = weakref.WeakSet()
        self.on_wait: Callable[[], None] = lambda: None
        self.close = weakref.finalize(self, self.fetcher.close)

    def mirror(self, url: str, manifest: Manifest, split: str) -> Path:
        """Return the folder in the cache for a dataset, with its dataset.json and the index of a split.

        Raises DatasetError if the index is missing or damaged, and OSError if it cannot be read or written.
        """
        folder = self.cache.folder / f"{name_of(url)}-{manifest.fingerprint}"
        record = manifest.split(split)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):  # other processes begin at the same time
            if not (folder / MANIFEST_NAME).exists():
                write_manifest(folder, manifest)
            self._mirror_file(url, folder, record.index, record.index_sha256)
            if record.checksums is not None and record.checksums_sha256 is not None:
                self._mirror_file(url, folder, record.checksums, record.checksums_sha256)
        return folder

    def _mirror_file(self, url: str, folder: Path, name: str, digest: str) -> None:
        path, source = folder / name, str(inside(url, name))
        if path.exists() and sha256(read_file(path)).hexdigest() == digest:
            return
        for _ in range(3):  # what was damaged on the way is fetched again
            try:
                content = with_retries(partial(read_once, source))
            except FileNotFoundError:
                raise DatasetError(f"{redact(source)} is missing: upload the dataset again") from None
            if sha256(content).hexdigest() == digest:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    file.write(content)
                return
        raise DatasetError(
            f"{redact(source)} does not match its checksum in dataset.json: upload the dataset again"
        )

    def shards(self, url: str, folder: Path, manifest: Manifest, split: str) -> list[RemoteShard]:
        """Return the shards of a split. folder: the dataset's in the cache."""
        return [
            RemoteShard(str(inside(url, record.file)), folder / record.file, record)
            for record in manifest.split(split).shards
        ]

    def demand(self, shards: list[RemoteShard]) -> None:
        """Have shards fetched before all others, while a batch waits. The fetcher's lock must be held."""
        demanded, present = self.priorities.demanded, self.priorities.present
        new = {shard.path: shard for shard in shards if shard.path not in demanded}
        # Another process may evict a shard at any time until it is open.
        gone = {shard.path for shard in shards if shard.path in present and not shard.path.exists()}
        for path in new:
            self.fetcher.problems.pop(path, None)  # there was no room without evicting what is needed sooner
        demanded.update(new)
        present.difference_update(gone)
        if new or gone:
            self.fetcher.start()
            self.fetcher.wake()

    def wait(self, is_ready: Callable[[], bool], shards: list[RemoteShard]) -> None:
        """Wait until `is_ready`, which is called with the fetcher's lock held.

        shards: those that it depends on. Raises OutageError if nothing arrives for OUTAGE_SECONDS, and
        DatasetError or OSError if the cache is full or cannot be written.
        """
        begun = last = time.monotonic()
        arrived = self.counters.bytes_fetched
        with self.fetcher.changed:
            try:
                while not is_ready():
                    now = time.monotonic()
                    if self.counters.bytes_fetched != arrived:
                        arrived, last = self.counters.bytes_fetched, now
                    self._check(shards, now - last)
                    self.release()
                    self.on_wait()
                    self.fetcher.changed.wait(_POLL_SECONDS)
            finally:
                for shard in shards:
                    self.priorities.demanded.pop(shard.path, None)
                self.counters.wait_seconds += time.monotonic() - begun

    def release(self) -> None:
        """Have the readers of this thread close what is not needed soon, so that it may be evicted."""
        self.priorities.update()
        for reader in self.readers:
            reader.release()

    def _check(self, shards: list[RemoteShard], seconds: float) -> None:
        """Raise an error if waiting makes no sense. seconds: for how long nothing has arrived."""
        if self.samples.problem is not None:
            raise self.samples.problem
        for shard in shards:
            problem = self.fetcher.problems.get(shard.path)
            if problem is None or (isinstance(problem, CacheFullError) and seconds < _FULL_SECONDS):
                continue
            if isinstance(problem, (FatalError, CacheFullError)) or seconds >= _FULL_SECONDS:
                raise problem
        if seconds >= OUTAGE_SECONDS:
            reason = self.fetcher.requests.problem or "nothing arrives"
            raise OutageError(
                f"{redact(shards[0].url)} cannot be fetched: {reason}. "
                "Run the same command again once it can be"
            )


def _evicted(counters: Counters, priorities: Priorities, path: Path) -> None:
    counters.evictions += 1
    priorities.present.discard(path)
