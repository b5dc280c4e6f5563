"""Choose the images of each epoch by quota: a share for each dataset, and a share for each class in it.

A group is a class of a dataset or, without balancing, a whole dataset. In every epoch, the number of images
of a dataset, and of a class within it, differs by less than one from what its share says. Fractions of an
image are owed to the group, and the groups that are owed most get the next whole images.

The images of a group follow each other in a stream of permutations, and an epoch takes up the stream where
the epoch before it left off. Therefore, all images of a group have been used equally often, to within one.
The state before an epoch depends only on the number of the epoch.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_SCALE = 2**30  # the largest weight as an integer; the smallest may be a billion times smaller
_STREAM = 2  # tells these random words from those of pipeline/plan.py
_BLOCK = 4  # 64-bit words that each counter value of Philox gives
_STATES_LOCK = threading.Lock()  # of all compositions, because one that holds a lock could not be pickled


def apportion(images: int, weights: np.ndarray, owed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide images among groups in proportion to their weights, by largest remainders.

    weights: int64, positive. owed: what each group was owed before, in units of 1 / weights.sum() of an
    image. Returns the number of images of each group, which is its proportional part rounded down or up, and
    what each is owed now.
    """
    total = int(weights.sum())
    counts, remainders = np.divmod(images * weights, total)
    owed = owed + remainders
    order = np.argsort(np.where(remainders > 0, -owed, np.iinfo(np.int64).max), kind="stable")
    favoured = order[: images - int(counts.sum())]
    counts[favoured] += 1
    owed[favoured] -= total
    return counts, owed


@dataclass(frozen=True)
class _State:
    """The state before an epoch: what the datasets and their groups are owed, and each group's use so far."""

    owed: np.ndarray  # [datasets]
    owed_within: tuple[np.ndarray, ...]  # [groups] of each dataset
    used: np.ndarray  # [all groups], number of images


@dataclass(frozen=True, eq=False)
class Composition:
    """The shares of groups of samples in each epoch.

    groups: for each dataset, the ascending sample numbers of each of its groups. weights: int64, those of the
    datasets. weights_within: int64, those of the groups of each dataset.
    """

    groups: tuple[tuple[np.ndarray, ...], ...]
    weights: np.ndarray
    weights_within: tuple[np.ndarray, ...]
    _states: list[_State] = field(default_factory=list)  # of all epochs so far, because each needs the last

    @classmethod
    def of(cls, labels: Sequence[np.ndarray], weights: Sequence[float], balance: float) -> "Composition":
        """Return the composition of weighted datasets whose samples are numbered one after another.

        labels: those of the samples of each dataset. weights: those of the datasets, positive. balance: 0
        takes the images of each dataset as they are, 1 takes equally many of each of its classes, and between
        them a class of n images has the weight n ** (1 − balance).
        """
        groups, within, start = [], [], 0
        for own in labels:
            numbers = start + np.argsort(own, kind="stable")
            sizes = np.bincount(own)
            sizes = sizes[sizes > 0]
            if not balance:
                numbers, sizes = start + np.arange(len(own)), np.array([len(own)])
            groups.append(tuple(np.split(numbers, np.cumsum(sizes)[:-1])))
            within.append(_integers(sizes ** (1.0 - balance)))
            start += len(own)
        return cls(tuple(groups), _integers(np.array(weights, float)), tuple(within))

    @cached_property
    def images(self) -> int:
        """The number of images in an epoch, which is that of all samples."""
        return sum(len(group) for groups in self.groups for group in groups)

    def counts(self, epoch: int) -> np.ndarray:
        """Return the number of images of each group in an epoch: int64 [all groups]."""
        return self._state(epoch + 1).used - self._state(epoch).used

    def samples(self, seed: int, epoch: int) -> np.ndarray:
        """Return the sample numbers of an epoch, ascending, some of them several times: int64 [images]."""
        starts, counts = self._state(epoch).used.tolist(), self.counts(epoch).tolist()
        key = np.random.SeedSequence((seed, 0, _STREAM)).generate_state(2, np.uint64)
        members = [group for groups in self.groups for group in groups]
        taken = [
            group[_stream(key, number, len(group), start, count)]
            for number, (group, start, count) in enumerate(zip(members, starts, counts, strict=True))
            if count
        ]
        return np.sort(np.concatenate(taken))

    def _state(self, epoch: int) -> _State:
        with _STATES_LOCK:  # threads that fetch ahead and the loader ask for epochs at the same time
            if not self._states:
                nothing_within = tuple(np.zeros_like(weights) for weights in self.weights_within)
                used = np.zeros(sum(map(len, self.groups)), np.int64)
                self._states.append(_State(np.zeros_like(self.weights), nothing_within, used))
            while len(self._states) <= epoch:
                self._states.append(self._next(self._states[-1]))
            return self._states[epoch]

    def _next(self, last: _State) -> _State:
        shares, owed = apportion(self.images, self.weights, last.owed)
        within = [
            apportion(share, weights, before)
            for share, weights, before in zip(
                shares.tolist(), self.weights_within, last.owed_within, strict=True
            )
        ]
        used = last.used + np.concatenate([counts for counts, _ in within])
        return _State(owed, tuple(owed for _, owed in within), used)


def _integers(weights: np.ndarray) -> np.ndarray:
    """Return weights as integers, so that quotas are exact and the same on every machine."""
    return np.maximum(1, np.rint(weights * (_SCALE / weights.max()))).astype(np.int64)


def _stream(key: np.ndarray, group: int, size: int, start: int, count: int) -> np.ndarray:
    """Return the positions `start` to `start + count − 1` of a group's endless sequence of permutations.

    size: number of samples in the group. The result is int64 [count], from 0 to size − 1.
    """
    first, last = start // size, (start + count - 1) // size
    blocks = -(-size // _BLOCK)
    philox = np.random.Philox(key=key, counter=[first * blocks, 0, 0, group])
    words = philox.random_raw((last - first + 1) * blocks * _BLOCK).reshape(-1, blocks * _BLOCK)
    orders = np.argsort(words[:, :size], axis=1, kind="stable")
    return orders.ravel()[start - first * size :][:count]
