"""The simulation of what hosts fetch from a bucket, on plans that are small enough to count by hand."""

from itertools import product

import numpy as np
import pytest

from pipeline.plan import Plan
from tools.benchmarks import traffic
from tools.benchmarks.traffic import SAMPLE_BYTES, Traffic, fetches


def fewest(uses: tuple[int, ...], capacity: int, cached: frozenset[int] = frozenset()) -> int:
    """Return the fewest fetches for some uses, by trying all evictions."""
    if not uses:
        return 0
    if uses[0] in cached:
        return fewest(uses[1:], capacity, cached)
    kept = [cached] if len(cached) < capacity else [cached - {shard} for shard in cached]
    return 1 + min(fewest(uses[1:], capacity, rest | {uses[0]}) for rest in kept)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_evicting_the_shard_that_is_needed_last_fetches_the_fewest(capacity):
    rng = np.random.default_rng(0)
    for uses in rng.integers(5, size=(50, 9)).tolist():
        least = fewest(tuple(uses), capacity)
        assert fetches(uses, capacity, "farthest").sum() == least
        assert fetches(uses, capacity, "lru").sum() >= least


def test_lru_evicts_the_shard_that_was_used_longest_ago():
    assert fetches([0, 1, 0, 2, 0, 1], 2, "lru").tolist() == [True, True, False, True, False, True]
    assert fetches([0, 1, 2, 0, 1, 2], 2, "lru").all()
    assert fetches([0, 1, 2, 0, 1, 2], 2, "farthest").sum() == 4


def test_a_cache_of_all_shards_fetches_each_once():
    """Both hosts take samples of each of the four shards in each epoch, because shards are ten batches."""
    found = traffic.traffic(Plan(0, 4, (40,) * 4), 2, [4])
    everything = 4 * 40 * SAMPLE_BYTES
    for policy in traffic.POLICIES:
        assert found[4, policy] == [Traffic(everything, 2 * everything), Traffic(0, 0)]


@pytest.mark.parametrize(("window", "batch"), list(product((0, 2), (4, 6))))
def test_the_uses_of_all_hosts_cover_the_samples_of_each_step(window, batch):
    plan = Plan(0, batch, (5, 7, 6), window)
    per_host = list(traffic.uses_by_host(plan, 2))
    shard_of = np.repeat(np.arange(3), (5, 7, 6))
    for epoch in range(2):
        steps = [step for step in range(plan.steps(3)) if step * batch // 18 == epoch]
        taken = {shard for step in steps for shard in shard_of[plan.step_samples(step)]}
        assert taken == {shard for uses, epochs in per_host for shard in uses[epochs == epoch]}


def test_the_table_has_a_row_for_each_plan_and_cache(call):
    done = call(traffic.main, "--samples", 64, "--shard-samples", 8, "--batch", 8, "--hosts", 1, 2)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| 1", "| 2"))]
    assert len(rows) == 2 * 2 * 3  # hosts, windows and caches
