"""When each shard is needed next, as the plan says.

A distance is a number of training images: how many the run takes until it needs a shard. It is 0 for shards
that are in use, and infinite if no use is known.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.plan import Plan, epoch_order
from pipeline.ranks import read_ranks


class Uses(Protocol):
    """The future of the shards of a split."""

    def distances(self) -> np.ndarray:
        """Return the distance of each shard's next use: float64 [shards]."""
        ...

    @property
    def soon(self) -> int:
        """The number of shards that must be in the cache together: those in use and those needed next."""
        ...


class TrainingUses:
    """The uses of the training shards by the processes of this machine.

    plan: the order of the run. ranks: those of this machine's processes. world: the number of all processes.
    The attribute `step` is the step from which on uses count.
    """

    def __init__(self, plan: Plan, ranks: range, world: int, step: int = 0):
        self.plan, self.ranks, self.world, self.step = plan, ranks, world, step
        self._shard_of = np.repeat(np.arange(len(plan.shard_samples)), plan.shard_samples)
        self._orders: dict[int, np.ndarray] = {}  # the shard of each position, by epoch

    @property
    def soon(self) -> int:
        return min(2 * self.plan.window, len(self.plan.shard_samples)) or len(self.plan.shard_samples)

    @property
    def images_to_epoch_end(self) -> int:
        """The number of images until the epoch ends, and an evaluation may begin."""
        return self.plan.samples - self.step * self.plan.batch % self.plan.samples

    def distances(self) -> np.ndarray:
        epoch, position = divmod(self.step * self.plan.batch, self.plan.samples)
        distances = self._first_uses(epoch, position) - position
        if np.isinf(distances).any():
            later = self._first_uses(epoch + 1, 0) + self.plan.samples - position
            distances = np.minimum(distances, later)
        return distances

    def _first_uses(self, epoch: int, start: int) -> np.ndarray:
        """Return the first position in an epoch, from `start` on, that needs each shard; infinite if none
        does.
        """
        plan = self.plan
        shards, positions = self._order(epoch)[start:], np.arange(start, plan.samples)
        if len(self.ranks) < self.world:
            within_step = (epoch * plan.samples + positions) % plan.batch
            ours = np.isin(within_step // plan.images_per_rank(self.world), self.ranks)
            shards, positions = shards[ours], positions[ours]
        first = np.full(len(plan.shard_samples), np.inf)
        first[shards[::-1]] = positions[::-1]  # of the values for an index, the last one stays
        return first

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            plan = self.plan
            order = epoch_order(plan.seed, epoch, plan.shard_samples, plan.window, plan.composition)
            self._orders = {kept: self._orders[kept] for kept in self._orders if abs(kept - epoch) == 1}
            self._orders[epoch] = self._shard_of[order]
        return self._orders[epoch]


class PassUses:
    """The uses of the shards of a split that is read in order, such as those of an evaluation.

    shard_samples: number of samples in each shard. The attribute `remaining` is the range of samples that the
    pass still has to read, or None between passes, and `pause` is how long a pause will be, in training
    images.
    """

    def __init__(self, shard_samples: Sequence[int]):
        self._ends = np.cumsum(shard_samples)
        self._starts = self._ends - shard_samples
        self.remaining: range | None = None
        self.pause = float("inf")

    def is_in_same_shard(self, samples: range) -> bool:
        """Return whether samples begin in the same shard as those that remain."""
        if self.remaining is None:
            return False
        first, now = np.searchsorted(self._ends, (self.remaining.start, samples.start), "right")
        return bool(first == now)

    @property
    def soon(self) -> int:
        return len(self._ends) if self.remaining is None else 2

    def distances(self) -> np.ndarray:
        if self.remaining is None:
            return np.full(len(self._ends), self.pause)
        start, stop = self.remaining.start, self.remaining.stop
        distances = np.maximum(self._starts - start, 0.0)
        distances[(self._ends <= start) | (self._starts >= stop)] = np.inf
        return distances


def ranks_here(rank: int, world: int) -> range:
    """Return the ranks of the processes of this machine."""
    ranks = read_ranks()
    if not ranks.is_launched or world != ranks.world_size:
        return range(world)
    first = rank - ranks.local_rank
    return range(first, first + ranks.local_world_size)
