"""Simulate how many bytes the hosts of a large run fetch from a bucket.

    python -m tools.benchmarks.traffic

Each host needs the samples that the plan gives to its ranks. Its cache holds whole shards, and evicts either
the one that the plan needs last (`farthest`) or the one that was used least recently (`lru`). The least
possible is that each host fetches its own samples and nothing else. Figures are for the first epoch, which
begins with an empty cache, and for the second.
"""

import argparse
import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.plan import Plan
from tools.options import command_parser, count, natural, positive

SAMPLE_BYTES = 20_400  # of ImageNet's training images at 256 px, on average
EPOCHS = 3  # the last one only provides the future of the second
POLICIES = ("farthest", "lru")


class Traffic(NamedTuple):
    """What the hosts fetch in an epoch, in bytes: the host that fetches the most, and all hosts together."""

    most: float
    total: float


def layout(samples: int, per_shard: int) -> tuple[int, ...]:
    """Return the numbers of samples in the shards, which are equal parts, as `make-shards` writes them."""
    shards = -(-samples // per_shard)
    return tuple(samples // shards + (shard < samples % shards) for shard in range(shards))


def uses_by_host(plan: Plan, hosts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each host's uses of shards in the order of the plan, and the epoch of each use.

    A shard is used once in each step that takes samples of it.
    """
    shard_of = np.repeat(np.arange(len(plan.shard_samples)), plan.shard_samples)
    steps = range(plan.steps(EPOCHS))
    epochs = [step * plan.batch // plan.samples for step in steps]
    shards: list[list[np.ndarray]] = [[] for _ in range(hosts)]
    for step in steps:
        for host, uses in enumerate(shards):
            uses.append(np.unique(shard_of[plan.step_samples(step, host, hosts)]))
    for uses in shards:
        yield np.concatenate(uses), np.repeat(epochs, [len(part) for part in uses])


def fetches(uses: Sequence[int], capacity: int, policy: str) -> np.ndarray:
    """Return for each use of a shard whether it must be fetched, bool [n].

    capacity: number of shards that the cache holds. policy: one of POLICIES.
    """
    next_use = [len(uses)] * len(uses)
    seen: dict[int, int] = {}
    for index in range(len(uses) - 1, -1, -1):
        next_use[index] = seen.get(uses[index], len(uses))
        seen[uses[index]] = index
    is_fetched = np.zeros(len(uses), bool)
    ranks: dict[int, int] = {}  # of the cached shards: that with the lowest rank is evicted
    queue: list[tuple[int, int]] = []  # (rank, shard), among them outdated ranks
    for index, shard in enumerate(uses):
        if shard not in ranks:
            is_fetched[index] = True
            while len(ranks) >= capacity:
                rank, evicted = heapq.heappop(queue)
                if ranks.get(evicted) == rank:
                    del ranks[evicted]
        ranks[shard] = -next_use[index] if policy == "farthest" else index
        heapq.heappush(queue, (ranks[shard], shard))
    return is_fetched


def traffic(plan: Plan, hosts: int, capacities: Sequence[int]) -> dict[tuple[int, str], list[Traffic]]:
    """Return the first and the second epoch's traffic by capacity, in shards, and policy."""
    shard_bytes = SAMPLE_BYTES * np.array(plan.shard_samples)
    bytes_of: dict[tuple[int, str], list[np.ndarray]] = {}  # for each host, the bytes of each epoch
    for uses, epochs in uses_by_host(plan, hosts):
        for capacity in capacities:
            for policy in POLICIES:
                weights = shard_bytes[uses] * fetches(uses.tolist(), capacity, policy)
                in_epochs = np.bincount(epochs, weights, minlength=EPOCHS)
                bytes_of.setdefault((capacity, policy), []).append(in_epochs)
    return {
        case: [Traffic(epoch.max(), epoch.sum()) for epoch in np.array(per_host).T[:2]]
        for case, per_host in bytes_of.items()
    }


def table(options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of a Markdown table, with a row for each plan and size of the cache."""
    shards = layout(options.samples, options.shard_samples)
    least = SAMPLE_BYTES * options.samples / 1e9
    yield f"{len(shards):,} shards, {least:.1f} GB; the least possible an epoch: {least:.1f} GB for all hosts"
    yield (
        "| hosts | batch | window | cache | "
        + " | ".join(f"epoch {epoch}, {policy}: a host, all" for policy in POLICIES for epoch in (1, 2))
        + " | least for a host |"
    )
    yield "|" + "---|" * (5 + 2 * len(POLICIES))
    for hosts in options.hosts:
        for batch in options.batch:
            for window in options.shuffle_window:
                plan = Plan(0, batch, shards, window)
                capacities = [max(1, round(share * len(shards))) for share in options.cache]
                found = traffic(plan, hosts, capacities)
                for share, capacity in zip(options.cache, capacities, strict=True):
                    cells = (
                        f"{epoch.most / 1e9:,.2f}, {epoch.total / 1e9:,.0f} GB"
                        for policy in POLICIES
                        for epoch in found[capacity, policy]
                    )
                    yield (
                        f"| {hosts} | {batch:,} | {window or 'all'} | {share:.0%} | {' | '.join(cells)} | "
                        f"{least / hosts:.2f} GB |"
                    )


def main() -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    few: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    add("--hosts", type=count, default=[1, 64], help="numbers of hosts (default 1 64)", **few)
    add("--batch", type=count, default=[1_024, 32_768], help="images in a step (default 1024 32768)", **few)
    shuffled = "shards shuffled together; 0: all (default 0 16)"
    add("--shuffle-window", type=natural, default=[0, 16], help=shuffled, **few)
    shares = "sizes, as shares of the dataset (default 1 0.333 0.05)"
    add("--cache", type=positive, nargs="+", default=[1.0, 1 / 3, 0.05], help=shares, metavar="F")
    add("--samples", type=count, default=1_281_167, metavar="N", help="samples (default: ImageNet's)")
    add("--shard-samples", type=count, default=1_000, metavar="N", help="samples in a shard (default 1000)")
    for line in table(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
