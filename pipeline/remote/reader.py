"""Read samples of datasets behind URLs, by number, from shards that are fetched into the cache."""

import errno
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.files import close_quietly
from pipeline.locations import Location
from pipeline.manifest import DatasetError, Manifest
from pipeline.output import say
from pipeline.plan import Plan
from pipeline.reader import JpegFiles, ShardReader, open_shard
from pipeline.remote.cache import CacheFullError, RemoteShard, lock_for_reading
from pipeline.remote.priorities import check_size
from pipeline.remote.requests import MISMATCH
from pipeline.remote.samples import SplitRanges
from pipeline.remote.schedule import PassUses, TrainingUses, ranks_here
from pipeline.remote.storage import RemoteStorage
from pipeline.remote_errors import redact

_CLOSED = -1
_LEAST_SHARE = 4  # of the samples that this machine must need to fetch whole shards, as a divisor
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
        self._is_remote = np.array([shard is not None for shard in self.remote])[self.rows["shard"]]
        self._thread = threading.get_ident()
        self._in_batch: set[int] = set()  # the shards of the batch that is being read, if some were not open
        self._arrived: dict[tuple[int, int], bytes | str] = {}  # what came by range
        self._lacked_room = False
        splits = [(root, manifest.split(split)) for root, manifest in local]
        self._ranges = SplitRanges.of(storage.samples, self.rows, self.remote, splits)
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

    def check_window(self, window: int, rank: int, world: int) -> None:
        priorities = self.storage.priorities
        shards = [shard for shard in self.remote if shard is not None]
        if self._takes_samples(ranks_here(rank, world), world):
            shards = []
        check_size(self.storage.cache, shards, window, priorities.bytes_of_other_splits(self._split_name))

    def _takes_samples(self, ranks: range, world: int) -> bool:
        """Return whether all samples are fetched on their own, because few of each shard are needed here.

        ranks: of the processes of this machine.
        """
        fits = self.storage.priorities.bytes_of_other_splits("") <= self.storage.cache.size
        return self._ranges is not None and not fits and len(ranks) * _LEAST_SHARE < world

    def follow(self, plan: Plan, step: int, rank: int, world: int) -> None:
        """Have the shards fetched in the order in which the processes of this machine need them."""
        together = ranks_here(rank, world)
        if self._ranges is not None:
            self._ranges.always = self._takes_samples(together, world)
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

    def retry_lost(self) -> np.ndarray:
        with self.storage.fetcher.changed:
            self.storage.fetcher.retry_lost({shard.path for shard in self.remote if shard is not None})
            self.storage.samples.forget_failures()
        return self._is_remote

    def _follow(self, uses: TrainingUses | PassUses) -> None:
        self._uses = uses
        with self.storage.fetcher.changed:
            by_range = self._ranges is not None and self._ranges.always
            shards = [None] * len(self.remote) if by_range else self.remote
            self.storage.priorities.set_uses(self._split_name, shards, uses)
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
                self._close(index)

    # ---- Reading

    def prefetch(self, numbers: np.ndarray) -> None:
        """Have samples read or fetched, without waiting for them."""
        super().prefetch(numbers)
        if self._ranges is None:
            return
        late = self._not_open(numbers)
        if late.size:
            with self.storage.fetcher.changed:
                always, priorities = self._ranges.always, self.storage.priorities
                priorities.update()
                # Samples of shards that are not wanted yet would come again with them.
                coming = priorities.wanted - priorities.present
                shards = [self.remote[index] for index in self.rows["shard"][late].tolist()]
                pairs = zip(late.tolist(), shards, strict=True)
                self._ranges.request([n for n, shard in pairs if shard and (always or shard.path in coming)])

    def read(self, numbers: np.ndarray) -> JpegFiles:
        """Read as `ShardReader` does, once the samples or their shards are there."""
        self._thread = threading.get_ident()
        self._arrived.clear()
        late = self._not_open(numbers)
        self.storage.counters.sample_hits += len(numbers) - len(late)
        if late.size:
            self._in_batch = set(self.rows["shard"][numbers].tolist())
            self._provide(late)
        files = super().read(numbers)
        self._in_batch = set()  # or another reader's shards would find no room
        if self._ranges is not None:
            self._ranges.forget(numbers[self._is_remote[numbers]].tolist())
        return files

    def _not_open(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples that must be read, and whose shards are not open."""
        if self._cache is not None:
            numbers = numbers[~self._is_cached[numbers]]
        return numbers[~self._is_open[self.rows["shard"][numbers]]]

    def _provide(self, numbers: np.ndarray) -> None:
        """Wait until the shards of samples are open, or the samples have arrived, or neither will happen."""
        of = dict(zip(numbers.tolist(), self.rows["shard"][numbers].tolist(), strict=True))
        opened = self._open_shards_of(set(of.values()))
        late = [number for number in of if of[number] not in opened]
        counters = self.storage.counters
        counters.shard_hits += len(opened)
        counters.shard_misses += len(set(of.values())) - len(opened)
        counters.sample_hits += len(of) - len(late)
        counters.sample_misses += len(late)

        def is_ready() -> bool:
            opened = self._open_shards_of({of[number] for number in late})
            late[:] = [number for number in late if of[number] not in opened and not self._take(number)]
            refused = late
            if self._ranges is not None:
                self._ranges.request([number for number in late if self._is_lost(of[number])], unlimited=True)
                refused = self._ranges.request(late)
            shards = self._shards(of[number] for number in refused)
            self.storage.demand(shards)
            if self._ranges is not None and self._lacks_room(shards):
                self._ranges.request(refused, unlimited=True)
            return not late

        if late:
            self.storage.wait(is_ready, self._shards(of[number] for number in late))

    def _is_lost(self, index: int) -> bool:
        shard = self.remote[index]
        return shard is not None and shard.path in self.storage.fetcher.lost

    def _lacks_room(self, shards: list[RemoteShard]) -> bool:
        """Return whether the cache has no room for a shard that is waited for, and say so the first time.

        The shards of a batch that spans several windows may be more than the cache can hold at a time.
        """
        problems = (self.storage.fetcher.problems.get(shard.path) for shard in shards)
        problem = next((problem for problem in problems if isinstance(problem, CacheFullError)), None)
        if problem is not None and not self._lacked_room:
            self._lacked_room = True
            say(f"{problem}; until then, samples are fetched one by one")
        return problem is not None

    def _shards(self, indices: Iterable[int]) -> list[RemoteShard]:
        return [shard for index in sorted(set(indices)) if (shard := self.remote[index]) is not None]

    def _take(self, number: int) -> bool:
        """Take a sample that has arrived by range, and return whether it has."""
        if self._ranges is None:
            return False
        found = self._ranges.samples.take(self._ranges.part(number))
        if found is None:
            return False
        shard, offset, *_ = self.rows[number].tolist()
        self._arrived[shard, offset] = found
        return True

    def _open_shards_of(self, indices: set[int]) -> set[int]:
        """Open those of the shards that are there; return them, and those that are lost for good."""
        return {index for index in indices if self._open(index)}

    def _open(self, index: int) -> bool:
        """Open a shard if it is there, and return whether no more can be done for it."""
        shard = self.remote[index]
        if self._is_open[index] or shard is None:
            return True
        lost = self.storage.fetcher.lost.get(shard.path)
        if lost is not None:  # what is intact in a damaged shard can still be fetched
            return self._ranges is None or lost != MISMATCH
        try:
            if not shard.path.exists():
                return False
            file = open_shard(shard.path, shard.record)
        except (DatasetError, OSError) as error:
            if isinstance(error, DatasetError) or error.errno == errno.EIO:
                self.storage.cache.remove(shard.path)  # damaged since it was fetched, or on a bad sector
            else:
                self.storage.fetcher.problems[shard.path] = error  # raised if it lasts
            return False
        if not lock_for_reading(file):
            close_quietly(file)
            return False
        self._files[index] = file
        self._is_open[index] = True
        return True

    def _close(self, index: int) -> None:
        file, self._files[index] = self._files[index], _CLOSED
        self._is_open[index] = False
        close_quietly(file)

    def _read_with_retries(self, shard: int, target: memoryview, offset: int) -> str | None:
        remote = self.remote[shard]
        if remote is None:
            return super()._read_with_retries(shard, target, offset)
        for _ in range(2):
            found = self._arrived.get((shard, offset))
            if isinstance(found, bytes) and len(found) == len(target):
                target[:] = found
                return None
            if isinstance(found, str):
                return f"cannot be read: it {found}"
            if not self._is_open[shard] and (lost := self._wait_for_shard(shard)):
                return f"cannot be read: the shard {lost}"
            failure = super()._read_with_retries(shard, target, offset)
            if failure is None:
                return None
            self._close(shard)  # it was damaged in the cache: fetch it again
            self.storage.cache.remove(remote.path)
        return failure

    def _wait_for_shard(self, index: int) -> str | None:
        """Wait until a shard is open or lost; return why it is lost, if it is."""
        shards, lost = self._shards([index]), None

        def is_ready() -> bool:
            nonlocal lost
            self.storage.demand(shards)
            lost = self.storage.fetcher.lost.get(shards[0].path)
            return lost is not None or self._open(index)

        self.storage.wait(is_ready, shards)
        return lost

    def location(self, number: int) -> str:
        row = self.rows[number]
        remote = self.remote[row["shard"]]
        return super().location(number) if remote is None else f"{redact(remote.url)} at byte {row['offset']}"
