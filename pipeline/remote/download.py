"""A shard that is being fetched, in blocks that may arrive in any order."""

from pipeline.remote.cache import Partial, RemoteShard

BLOCK_BYTES = 64 << 10  # three samples of 256 px


class Download:
    """The file of a shard, and which of its blocks have arrived. All methods need the fetcher's lock.

    users: number of threads that fetch a part of it, or read what has arrived. is_over: whether it has been
    published, or is to be discarded once its users have left.
    """

    def __init__(self, shard: RemoteShard, partial: Partial):
        self.shard, self.partial = shard, partial
        self.users, self.is_over = 0, False
        self.restart()

    def restart(self) -> None:
        """Have everything fetched again."""
        self._count = -(-self.shard.record.bytes // BLOCK_BYTES)
        self._missing = set(range(self._count))
        self._claimed: set[int] = set()  # those of them that a thread fetches
        self._begun = 0  # no block before this one is free

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def next_part(self, limit: int, join: int) -> range | None:
        """Return the next bytes that this thread must fetch, in whole blocks; None if there are none.

        They have not arrived, and no other thread fetches them. limit: their largest number, unless a block
        has more. join: the largest number of bytes that have arrived and are fetched once more rather than
        left out.
        """
        start = next(filter(self._is_free, range(self._begun, self._count)), None)
        if start is None:
            self._begun = self._count
            return None
        stop = start + 1
        for block in range(stop, min(self._count, start + limit // BLOCK_BYTES)):
            if self._is_free(block):
                if (block - stop) * BLOCK_BYTES > join:
                    break
                stop = block + 1
        self._begun = stop
        self._claimed.update(range(start, stop))
        return self._bytes(start, stop)

    def has(self, start: int, stop: int) -> bool:
        """Return whether the bytes from `start` to `stop` are in the file."""
        return self._missing.isdisjoint(_blocks(start, stop))

    def part_with(self, start: int, stop: int) -> range | None:
        """Return the bytes that this thread must fetch for those from `start` to `stop`, in whole blocks.

        Returns None if all of them have arrived, or are fetched by other threads.
        """
        blocks = list(filter(self._is_free, _blocks(start, stop)))
        if not blocks:
            return None
        self._claimed.update(blocks)
        return self._bytes(blocks[0], blocks[-1] + 1)

    def release(self, part: range) -> None:
        """Note that a thread has ended to fetch a part. Others fetch what has not arrived of it."""
        blocks = _blocks(part.start, part.stop)
        self._claimed.difference_update(blocks)
        self._begun = min({self._begun, *self._missing.intersection(blocks)})

    def arrived(self, part: range) -> None:
        """Note that a part is in the file."""
        self._missing.difference_update(_blocks(part.start, part.stop))

    def distrust(self, start: int, stop: int) -> None:
        """Have bytes fetched again, because they are not those of the shard."""
        blocks = _blocks(start, stop)
        self._missing.update(blocks)
        self._begun = min(self._begun, blocks.start)

    def _is_free(self, block: int) -> bool:
        return block in self._missing and block not in self._claimed

    def _bytes(self, start: int, stop: int) -> range:
        return range(start * BLOCK_BYTES, min(stop * BLOCK_BYTES, self.shard.record.bytes))


def _blocks(start: int, stop: int) -> range:
    """Return the blocks that have these bytes."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
