"""Read samples of datasets behind URLs, by number, from shards that are fetched into the cache."""

import threading
from collections.abc import Sequence

import numpy as np

from pipeline.files import close_quietly
from pipeline.locations import Location
from pipeline.manifest import DatasetError, Manifest
from pipeline.plan import Plan
from pipeline.ranks import read_ranks
from pipeline.reader import JpegFiles, ShardReader, open_shard
from pipeline.remote.cache import RemoteShard, lock_for_reading
from pipeline.remote.schedule import PassUses, TrainingUses
from pipeline.remote.storage import RemoteStorage
from pipeline.remote_errors import redact

_CLOSED = -1
_UPDATES = 16  # of the order of the shards, while the run reads those that it wants now


class RemoteShardReader(ShardReader):
    """Reads a split whose shards, or some of them, are behind URLs.

    Shards are opened when a batch needs them, which waits until they are there, and closed once the plan does
    not need them soon. Bytes are read only from shards that match their checksums.

    A shard that is lost is damage of each of its samples. Raises DatasetError and OSError as `RemoteStorage`
    does.
    """

    def __init__(
        self,
        storage: RemoteStorage,
        sources: Sequence[tuple[Location, Manifest]],
        split: str,
        processes: int = 1,
    ):
        self.storage = storage
        self.remote: list[RemoteShard | None] = []
        local = []
        for location, manifest in sources:
            if isinstance(location, str):
                folder = storage.mirror(location, manifest, split)
                self.remote += storage.shards(location, folder, manifest, split)
            else:
                folder = location
                self.remote += [None] * len(manifest.split(split).shards)
            local.append((folder, manifest))
        (root, manifest), *others = local
        self._split_name = split
        super().__init__(root, manifest, split, processes, others)
        self._thread = threading.get_ident()
        self._in_batch: set[int] = set()  # the shards of the batch that is waited for
        self._follow(PassUses([record.samples for _, record in self.shards]))
        storage.readers.add(self)

    def _open_shards(self) -> None:
        self._is_open = np.zeros(len(self.shards), bool)
        for index, shard in enumerate(self.remote):
            self._files.append(_CLOSED)
            if shard is None:
                self._files[index] = self._opened(index)
                self._is_open[index] = True

    # ---- What the plan needs

    def check_window(self, window: int) -> None:
        """Raise DatasetError if the cache is too small for two windows of shards and the other splits."""
        sizes = sorted((shard.record.bytes for shard in self.remote if shard), reverse=True)
        needed = sum(sizes[: 2 * window] if window else sizes)
        needed += self.storage.priorities.bytes_of_other_splits(self._split_name)
        cache = self.storage.cache
        if needed > cache.size:
            what = f"two windows of {window} shards" if window else "all shards, shuffled together,"
            raise DatasetError(
                f"the cache {cache.folder} has {cache.size / 1e9:.3g} GB, but {what} and those for "
                f"evaluation take {needed / 1e9:.3g} GB: use a larger --cache-size, "
                f"or {'a smaller' if window else 'a'} --shuffle-window"
            )

    def follow(self, plan: Plan, step: int, rank: int, world: int) -> None:
        """Have the shards fetched in the order in which the processes of this machine need them."""
        ranks = read_ranks()
        together = range(world)
        if ranks.is_launched and world == ranks.world_size:
            first = rank - ranks.local_rank
            together = range(first, first + ranks.local_world_size)
        self._follow(TrainingUses(plan, together, world, step))

    def advance(self, step: int) -> None:
        """Note that the samples of the steps before this one have been read."""
        uses = self._uses
        if isinstance(uses, TrainingUses) and abs(step - uses.step) >= self._steps_between_updates:
            with self.storage.fetcher.changed:
                uses.step = step
                self.storage.priorities.changed()
        if self._wanted is not self.storage.priorities.wanted:
            self.release()

    def read_in_order(self, samples: range | None) -> None:
        """Have the shards of a pass over consecutive samples fetched; None ends the pass."""
        uses = self._uses
        if not isinstance(uses, PassUses) or (samples is not None and uses.is_in_same_shard(samples)):
            return
        with self.storage.fetcher.changed:
            uses.remaining = samples
            self.storage.priorities.changed()
            self.storage.fetcher.start()
        self.release()

    def _follow(self, uses: TrainingUses | PassUses) -> None:
        self._uses = uses
        with self.storage.fetcher.changed:
            self.storage.priorities.set_uses(self._split_name, self.remote, uses)
            if isinstance(uses, TrainingUses):
                share = uses.soon / len(self.shards)
                self._steps_between_updates = int(share * len(self.rows) / _UPDATES / uses.plan.batch) + 1
                self.storage.fetcher.start()
        self._wanted = self.storage.priorities.wanted

    def release(self) -> None:
        """Close the shards that are not needed soon, if this is the thread that reads them."""
        if self._thread != threading.get_ident():
            return
        self._wanted = wanted = self.storage.priorities.wanted
        for index in np.flatnonzero(self._is_open).tolist():
            shard = self.remote[index]
            if shard is not None and shard.path not in wanted and index not in self._in_batch:
                file, self._files[index] = self._files[index], _CLOSED
                self._is_open[index] = False
                close_quietly(file)

    # ---- Reading

    def read(self, numbers: np.ndarray) -> JpegFiles:
        """Read as `ShardReader` does, once the samples' shards are there."""
        self._thread = threading.get_ident()
        needed = numbers if self._cache is None else numbers[~self._is_cached[numbers]]
        shards = self.rows["shard"][needed]
        is_open = self._is_open[shards]
        if not is_open.all():
            self._in_batch = set(shards.tolist())
            self._provide(np.unique(shards[~is_open]).tolist())
        self.storage.counters.sample_hits += int(is_open.sum())
        return super().read(numbers)

    def _provide(self, indices: list[int]) -> None:
        """Open shards, after waiting until they are there. Those that are lost stay closed."""
        missing = [index for index in indices if not self._open(index)]
        self.storage.counters.shard_hits += len(indices) - len(missing)
        self.storage.counters.shard_misses += len(missing)
        if missing:
            shards = [shard for index in missing if (shard := self.remote[index]) is not None]
            self.storage.wait(lambda: self._have_opened(missing), shards)

    def _have_opened(self, indices: list[int]) -> bool:
        """Open those of the shards that are there, and return whether it was all of them."""
        return sum(map(self._open, indices)) == len(indices)

    def _open(self, index: int) -> bool:
        """Open a shard if it is there, and return whether no more can be done for it."""
        shard = self.remote[index]
        if self._is_open[index] or shard is None or shard.path in self.storage.fetcher.lost:
            return True
        try:
            file = open_shard(shard.path, shard.record)
        except DatasetError:  # not there, or damaged since it was fetched
            self.storage.cache.evict(shard.path)
            return False
        if not lock_for_reading(file):
            close_quietly(file)
            return False
        self._files[index] = file
        self._is_open[index] = True
        return True

    def _read_with_retries(self, shard: int, target: memoryview, offset: int) -> str | None:
        remote = self.remote[shard]
        if remote is None:
            return super()._read_with_retries(shard, target, offset)
        if not self._is_open[shard]:
            self._provide([shard])
        if not self._is_open[shard]:
            return f"cannot be read: the shard {self.storage.fetcher.lost[remote.path]}"
        return super()._read_with_retries(shard, target, offset)

    def location(self, number: int) -> str:
        row = self.rows[number]
        remote = self.remote[row["shard"]]
        return super().location(number) if remote is None else f"{redact(remote.url)} at byte {row['offset']}"
