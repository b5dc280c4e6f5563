"""Count what a process fetches from storage."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What a process has fetched so far, and how often it found what it needed in the cache.

    bytes_fetched, shards_fetched, samples_by_range: what has arrived and passed its check, except that
    bytes_fetched counts everything that has arrived. shard_hits, shard_misses: shards that were in the cache,
    or were not, when they were opened. sample_hits, sample_misses: the same of samples when a batch needed
    them. evictions: shards deleted from the cache. retries: requests that were repeated. wait_seconds: time
    that batches waited for storage. Each number is only changed while the fetcher's lock is held.
    """

    bytes_fetched: int = 0
    shards_fetched: int = 0
    samples_by_range: int = 0
    shard_hits: int = 0
    shard_misses: int = 0
    sample_hits: int = 0
    sample_misses: int = 0
    evictions: int = 0
    retries: int = 0
    wait_seconds: float = 0.0
