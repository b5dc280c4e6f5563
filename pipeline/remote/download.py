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
        self._claimed: set[int] = set()  # those of them that are fetched for samples
        self._begun = 0  # the blocks before this one have arrived or are being fetched

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def next_part(self, limit: int, join: int) -> range | None:
        """Return the next bytes that have not arrived and that no thread fetches; None if there are none.

        limit: their largest number, unless a block has more. join: the largest number of bytes that have
        arrived and are fetched once more rather than left out.
        """
        start = next(filter(self._is_free, range(self._begun, self._count)), None)
        if start is None:
            return None
        stop = start + 1
        for block in range(stop, min(self._count, start + limit // BLOCK_BYTES)):
            if self._is_free(block):
                if (block - stop) * BLOCK_BYTES > join:
                    break
                stop = block + 1
        self._begun = stop
        return self._bytes(start, stop)

    def has(self, start: int, stop: int) -> bool:
        """Return whether the bytes from `start` to `stop` are in the file."""
        return self._missing.isdisjoint(_blocks(start, stop))

    def claim(self, start: int, stop: int) -> range | None:
        """Return the bytes, in whole blocks, that this thread must fetch for samples.

        Returns None if all of them are in the file, or are fetched by other threads.
        """
        blocks = list(filter(self._is_free, _blocks(start, stop)))
        if not blocks:
            return None
        self._claimed.update(blocks)
        return self._bytes(blocks[0], blocks[-1] + 1)

    def release(self, part: range) -> None:
        """End the claim of a thread. What has not arrived is fetched by others."""
        blocks = _blocks(part.start, part.stop)
        self._claimed.difference_update(blocks)
        self._begun = min(self._begun, *(self._missing.intersection(blocks) or (self._begun,)))

    def arrived(self, part: range) -> None:
        """Note that bytes, in whole blocks, are in the file."""
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
