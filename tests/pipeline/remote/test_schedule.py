"""Shards are fetched before they are needed, and those give way that the plan needs last."""

import re
from collections import OrderedDict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import DatasetError, EvaluationLoader, Loader, open_dataset
from pipeline.manifest import Shard
from pipeline.plan import Plan
from pipeline.remote.cache import RemoteShard, locked
from pipeline.remote.priorities import Priorities
from pipeline.remote.samples import SplitRanges
from pipeline.remote.schedule import PassUses, TrainingUses
from tests.helpers import assert_same_batches, copies

PLAN = Plan(seed=3, batch=20, shard_samples=(10,) * 30, window=3)
EPOCH = PLAN.samples // PLAN.batch


def shards_of(count: int) -> list[RemoteShard]:
    record = {"samples": 10, "bytes": 1, "sha256": "", "head_sha256": ""}
    names = [f"{number}.tar" for number in range(count)]
    return [RemoteShard(f"s3://b/{n}", Path("/nowhere") / n, Shard(file=n, **record)) for n in names]


def used(plan: Plan, step: int, ranks: range, world: int) -> set[int]:
    samples = np.concatenate([plan.step_samples(step, rank, world) for rank in ranks])
    return set((samples // 10).tolist())


@pytest.mark.parametrize(("ranks", "world"), [(range(1), 1), (range(2, 4), 4), (range(1, 2), 20)])
@pytest.mark.parametrize("step", [0, 4, EPOCH - 1, EPOCH, 2 * EPOCH + 5])
def test_distances_are_those_of_the_next_use(ranks, world, step):
    distances = TrainingUses(PLAN, ranks, world, step).distances()
    for shard in range(30):
        uses = (later for later in range(step, step + 3 * EPOCH) if shard in used(PLAN, later, ranks, world))
        first = next(uses, np.inf) - step
        if first < EPOCH:
            assert first * PLAN.batch <= distances[shard] < (first + 1) * PLAN.batch


def test_a_pass_needs_its_shards_in_order():
    uses = PassUses([10, 10, 10, 10])
    uses.pause = 70.0
    assert uses.distances().tolist() == [70] * 4
    uses.remaining = range(12, 25)
    assert uses.distances().tolist() == [np.inf, 0, 8, np.inf]


def fetched(capacity: int, epochs: int, victim) -> int:
    """Return how many shards are fetched if each is fetched when it is needed, and `victim` is evicted for
    it.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    count = 0
    for step in range(epochs * EPOCH):
        for shard in sorted(used(PLAN, step, range(1), 1)):
            if shard not in cache:
                count += 1
                if len(cache) == capacity:
                    del cache[victim(cache, step)]
            cache[shard] = None
            cache.move_to_end(shard)
    return count


def test_the_order_fetches_less_than_least_recently_used_shards_and_little_more_than_possible():
    def by_plan(ahead: bool) -> int:
        """Fetch as the threads do if they are fast, or only on demand."""
        priorities, shards, count = Priorities(), shards_of(30), 0
        uses = TrainingUses(PLAN, range(1), 1)
        priorities.set_uses("train", shards, uses)
        for step in range(4 * EPOCH):
            uses.step = step
            priorities.changed()
            for shard, room in priorities.order():
                if ahead or shard.path in {shards[number].path for number in used(PLAN, step, range(1), 1)}:
                    victims = [path for path in room.victims if path in priorities.present]
                    if len(priorities.present) == 10 and victims:
                        priorities.present.remove(victims[0])
                    if len(priorities.present) < 10:
                        priorities.present.add(shard.path)
                        count += 1
            assert {shards[number].path for number in used(PLAN, step, range(1), 1)} <= priorities.present
        return count

    def farthest(cache, step):
        distances = TrainingUses(PLAN, range(1), 1, step).distances()
        return max(cache, key=lambda shard: distances[shard])

    least = fetched(10, 4, farthest)
    recent = fetched(10, 4, lambda cache, step: next(iter(cache)))
    print(f"by plan {by_plan(True)}, on demand {by_plan(False)}, least {least}, LRU {recent}")
    assert least <= by_plan(ahead=True) < 0.9 * recent
    assert by_plan(ahead=True) <= 1.15 * least


def batches(dataset, steps=20):
    options = {"seed": 7, "device": "cpu", "dtype": torch.float32, "shuffle_window": 2}
    found = []
    validation = EvaluationLoader(dataset, 6, 64, device="cpu", dtype=torch.float32)
    loader = Loader(dataset, 12, 64, **options)
    for epoch in range(steps // 5):
        found += copies(islice(loader.batches(5 * epoch), 5)) + copies(validation)
    return found


@pytest.mark.usefixtures("_short_look_ahead", "_larger_than_memory")
def test_the_smallest_cache_that_is_accepted_is_never_larger_and_gives_the_same_batches(
    many_shards, bucket, remote, tmp_path, monkeypatch
):
    monkeypatch.setattr(SplitRanges, "of", lambda *_: None)  # as if samples could not be fetched on their own
    sizes = {name: len(content) for name, content in bucket.files.items() if name.endswith(".tar")}
    train = sorted((size for name, size in sizes.items() if name.startswith("train")), reverse=True)
    limit = sum(train[:4]) + sum(size for name, size in sizes.items() if name.startswith("val"))
    with pytest.raises(DatasetError, match="use a larger --cache-size"):
        batches(remote(str(limit - 1)))
    largest = 0

    def watch(*_: object) -> bool:
        nonlocal largest
        with locked(tmp_path / "cache"):  # or a shard and another one that replaces it would both count
            present = (path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar*") if path.exists())
            largest = max(largest, sum(present))
        return False

    dataset = remote(str(limit))
    bucket.fault = watch
    assert_same_batches(batches(dataset), batches(open_dataset(many_shards)))
    assert largest <= limit
    counters = dataset.storage.counters
    assert 0 < counters.evictions < counters.shards_fetched
    assert sum(sizes.values()) < counters.bytes_fetched < 4 * sum(sizes.values())


@pytest.mark.usefixtures("_short_look_ahead", "_larger_than_memory", "_whole_shards")
def test_what_the_cache_has_no_room_for_is_fetched_by_sample(many_shards, bucket, remote, capfd):
    """Each batch is a whole epoch, of twelve shards, and the cache has room for the four of two windows."""
    sizes = [len(content) for name, content in bucket.files.items() if name.endswith(".tar")]
    found = []
    for dataset in (remote(str(4 * max(sizes))), open_dataset(many_shards)):
        loader = Loader(dataset, 60, 64, seed=7, device="cpu", dtype=torch.float32, shuffle_window=2)
        found.append(copies(islice(loader.batches(0), 2)))
    assert_same_batches(*found)
    said = capfd.readouterr().err
    assert said.count("has no room") == 1
    assert "more space with --cache-size" in said
    assert "one by one" in said


def test_a_cache_that_is_too_small_for_the_plan_is_refused(bucket, remote):
    train = sum(
        len(data) for name, data in bucket.files.items() if name.startswith("train") and "tar" in name
    )
    dataset = remote(str(train - 1))
    with pytest.raises(DatasetError, match="larger --cache-size, or a --shuffle-window"):
        Loader(dataset, 12, 64)
    Loader(dataset, 12, 64, shuffle_window=2)
    dataset.reader("val")
    with pytest.raises(DatasetError, match="larger --cache-size, or a smaller --shuffle-window") as refusal:
        Loader(dataset, 12, 64, shuffle_window=6)
    enough = remote(re.search(r"take (\S+ GB)", str(refusal.value))[1])
    enough.reader("val")
    Loader(enough, 12, 64, shuffle_window=6)
