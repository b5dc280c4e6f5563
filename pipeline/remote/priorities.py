"""Decide which shard is fetched next, and which shards give way for it.

The shards that the plan needs soonest are wanted: for them, shards that are needed later are evicted, those
first that are needed last (Belady, 1966). Further shards are fetched only into free space, because evicting
for them so early could evict what is needed before them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.manifest import DatasetError
from pipeline.remote.cache import Cache, RemoteShard, Room
from pipeline.remote.schedule import PassUses, TrainingUses, Uses

_IDLE_SECONDS = 3600.0  # after which a shard of another dataset counts as unused


class Priorities:
    """What is to be fetched and evicted. All methods must be called with the fetcher's lock held.

    wanted: paths of the shards that are in use or needed next. demanded: the shards that a reader waits for.
    present: paths of the shards that are known to be in the cache.
    """

    def __init__(self) -> None:
        self.wanted: frozenset[Path] = frozenset()
        self.demanded: dict[Path, RemoteShard] = {}
        self.present: set[Path] = set()
        self._uses: dict[str, tuple[Sequence[RemoteShard | None], Uses]] = {}
        self._order: list[RemoteShard] | None = None  # by distance; None if it must be computed
        self._wanted_by_url: dict[str, RemoteShard] = {}
        self._known: frozenset[Path] = frozenset()
        self._farthest: list[Path] = []
        self._spare: list[Path] = []  # those that are not wanted, the farthest first

    def set_uses(self, split: str, shards: Sequence[RemoteShard | None], uses: Uses) -> None:
        """Set the future of a split. shards: None for those that are not behind URLs."""
        self._uses[split] = shards, uses
        self.present.update(shard.path for shard in shards if shard is not None and shard.path.exists())
        self.changed()

    def changed(self) -> None:
        """Note that the order must be computed again, because the uses have changed."""
        self._order = None

    def bytes_of_other_splits(self, split: str) -> int:
        """Return the size of the shards behind URLs of all splits but one, in bytes."""
        others = (shards for other, (shards, _) in self._uses.items() if other != split)
        return sum(shard.record.bytes for shards in others for shard in shards if shard is not None)

    def wanted_shard(self, url: str) -> RemoteShard | None:
        """Return the shard behind a URL, if it is wanted."""
        self.update()
        return self._wanted_by_url.get(url)

    @property
    def room(self) -> Room:
        """What may be evicted for a shard that is wanted."""
        return Room(self._known, self._spare)

    def update(self) -> None:
        """Compute the order again if the uses have changed."""
        if self._order is None:
            self._order = self._sorted()

    def order(self) -> Iterator[tuple[RemoteShard, Room]]:
        """Yield the shards to fetch, most urgent first, and what may be evicted for each."""
        self.update()
        for path, shard in list(self.demanded.items()):
            if path not in self.present:
                yield (
                    shard,
                    Room(self._known, [other for other in self._farthest if other not in self.demanded]),
                )
        for shard in self._order or ():
            if shard.path not in self.present:
                is_wanted = shard.path in self.wanted
                yield shard, self.room if is_wanted else Room(self._known, (), _IDLE_SECONDS)

    def _sorted(self) -> list[RemoteShard]:
        """Return the shards by the distance of their next use, and update what depends on it."""
        training = [uses for _, uses in self._uses.values() if isinstance(uses, TrainingUses)]
        pause = min((uses.images_to_epoch_end for uses in training), default=math.inf)
        found: dict[Path, tuple[float, RemoteShard]] = {}
        soon = 0
        for shards, uses in self._uses.values():
            if isinstance(uses, PassUses):
                uses.pause = pause
            distances = uses.distances()
            soon += uses.soon
            for distance, shard in zip(distances.tolist(), shards, strict=True):
                if shard is not None and distance <= found.get(shard.path, (math.inf,))[0]:
                    found[shard.path] = distance, shard
        order = sorted(found.values(), key=lambda entry: entry[0])
        wanted = [shard for distance, shard in order[:soon] if distance < math.inf]
        self._wanted_by_url = {shard.url: shard for shard in wanted}
        self.wanted = frozenset(shard.path for shard in wanted)
        self._known = frozenset(found)
        self._farthest = [shard.path for _, shard in reversed(order)]
        self._spare = [path for path in self._farthest if path not in self.wanted]
        return [shard for _, shard in order]


def check_size(cache: Cache, shards: Sequence[RemoteShard], window: int, others: int) -> None:
    """Raise DatasetError if a cache is too small for two windows of shards (0: all of them) and other splits.

    The processes of a machine read the same windows, so they need no more than one process. shards: those of
    the split that are fetched whole; none if all of its samples are fetched on their own. others: the size of
    the other splits, in bytes.
    """
    sizes = sorted((shard.record.bytes for shard in shards), reverse=True)
    needed = sum(sizes[: 2 * window] if window else sizes) + others
    if needed <= cache.size:
        return
    what, remedy = "the shards for evaluation", "use a larger --cache-size"
    if shards:
        windows = f"two windows of {window} shards" if window else "all shards, shuffled together,"
        what = f"{windows} and those for evaluation"
        remedy += f", or {'a smaller' if window else 'a'} --shuffle-window"
    raise DatasetError(
        f"the cache {cache.folder} has {cache.size / 1e9:g} GB, but {what} take {_rounded_up(needed)} GB: "
        f"{remedy}"
    )


def _rounded_up(size: int) -> str:
    """Return a size in bytes in GB, to three digits, such that a cache of what is returned is enough."""
    unit = 10 ** max(len(str(size)) - 3, 0)
    return f"{-(-size // unit) * unit / 1e9:g}"
