"""Compute the order and the augmentation of images as pure functions of (seed, epoch, position).

Training is one endless sequence of positions. Epoch e is the positions e·N to (e+1)·N − 1, in which each of
the N samples comes exactly once or, with a composition, as often as its quotas say. Step k takes the B
positions k·B to (k+1)·B − 1, whatever their epoch, and rank r of W takes the r-th of W equal parts of each
step. Therefore every batch is full, all ranks end together, a run resumes from one integer, and no random
draw depends on the number of ranks, on threads or on prefetching.

With `crop_chunk`, an image takes its crop and mirror from the first image of its chunk, whose position is
known, so this remains true.

Random numbers are computed from the raw 64-bit words of Philox. NumPy promises that a bit generator gives the
same words in every version, which it does not promise of `permutation` or `normal`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from pipeline.composition import Composition

_ORDER, _AUGMENT, _RESIZE = 0, 1, 3  # independent streams of an epoch; composition.py has stream 2
_WORDS = 8  # 64-bit words per position in the augmentation stream; each counter value of Philox gives 4
_RESIZE_WORDS = 24  # the same in the stream for random resized crops, which need RESIZE_DRAWS of them
RESIZE_DRAWS = 22


@lru_cache(maxsize=8)
def _key(seed: int, epoch: int, stream: int) -> np.ndarray:
    return np.random.SeedSequence((seed, epoch, stream)).generate_state(2, np.uint64)


def _philox(seed: int, epoch: int, stream: int, position: int = 0, words: int = _WORDS) -> np.random.Philox:
    return np.random.Philox(key=_key(seed, epoch, stream), counter=position * (words // 4))


def _uniform(words: np.ndarray) -> np.ndarray:
    """Turn the upper 53 bits of words into uniform numbers in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def epoch_order(
    seed: int,
    epoch: int,
    shard_samples: Sequence[int],
    window: int = 0,
    composition: Composition | None = None,
) -> np.ndarray:
    """Return the epoch's order of the samples, int64 [sum(shard_samples)].

    window: number of shards that are shuffled together; 0 means all of them, a global shuffle. Otherwise the
    shards are permuted, and then the samples within each window of shards, so that a dataset larger than
    memory is read a few shards at a time. composition: chooses the samples; by default, each comes once.
    """
    shards, samples = len(shard_samples), int(np.sum(shard_samples))
    words = _philox(seed, epoch, _ORDER).random_raw(shards + samples)
    chosen = np.arange(samples) if composition is None else composition.samples(seed, epoch)
    ends = np.searchsorted(chosen, np.cumsum(shard_samples)[:-1])
    places = np.split(np.arange(samples), ends)  # the places in `chosen` of each shard's samples
    shard_order = np.argsort(words[:shards], kind="stable")
    windows = []
    for first in range(0, shards, window or shards):
        shards_in_window = np.sort(shard_order[first:][: window or shards])
        in_window = np.concatenate([places[shard] for shard in shards_in_window])
        windows.append(in_window[np.argsort(words[shards + in_window], kind="stable")])
    return chosen[np.concatenate(windows)]


@dataclass(frozen=True)
class Draws:
    """The random numbers of n positions.

    uniform: [n,2] in [0, 1), for the crop's x and y. mirror: bool [n]. normal: [n,3], standard normal, for
    the colour offset.
    """

    uniform: np.ndarray
    mirror: np.ndarray
    normal: np.ndarray


def draws(seed: int, epoch: int, start: int, count: int) -> Draws:
    """Return the random numbers for the positions start to start + count − 1 within an epoch."""
    words = _philox(seed, epoch, _AUGMENT, start).random_raw(count * _WORDS).reshape(count, _WORDS)
    u = _uniform(words)
    # The Box–Muller transform, with 1 − u because log(0) is not finite. The fourth number is not needed.
    radius = np.sqrt(-2.0 * np.log1p(-u[:, 4:6]))
    angle = 2.0 * np.pi * u[:, 6:8]
    normal = np.concatenate((radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])), axis=1)
    return Draws(u[:, 0:2], words[:, 2] >> np.uint64(63) == 1, normal)


def resize_draws(seed: int, epoch: int, start: int, count: int) -> np.ndarray:
    """Return the random numbers for random resized crops, [count,RESIZE_DRAWS] in [0, 1).

    start, count: as for `draws`, whose numbers are independent of these.
    """
    words = _philox(seed, epoch, _RESIZE, start, _RESIZE_WORDS).random_raw(count * _RESIZE_WORDS)
    return _uniform(words.reshape(count, _RESIZE_WORDS)[:, :RESIZE_DRAWS])


@dataclass(frozen=True)
class RankBatch:
    """A rank's share of one step or of several: n images.

    samples: int64 [n], sample numbers. epoch: [n], the epoch of each, as an epoch may end within a batch.
    """

    samples: np.ndarray
    epoch: np.ndarray
    draws: Draws


@dataclass(frozen=True)
class Plan:
    """The order of a whole run.

    shard_samples: number of samples in each shard. batch: number of images in a step over all ranks. window:
    as for `epoch_order`. crop_chunk: number of consecutive images in a step that share the draws of the first
    one for crop and mirror; the last chunk of a step may be smaller. composition: the shares of classes and
    datasets in each epoch; by default, each sample comes once. Raises ValueError if the batch is not
    positive, or if window or crop_chunk are out of range.
    """

    seed: int
    batch: int
    shard_samples: tuple[int, ...]
    window: int = 0
    crop_chunk: int = 1
    composition: Composition | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"the batch must have 1 image or more, not {self.batch}")
        if self.window < 0:
            raise ValueError(f"the number of shards to shuffle together must be 0 or more, not {self.window}")
        if self.crop_chunk < 1:
            raise ValueError(f"crop_chunk must be 1 or more, not {self.crop_chunk}")

    @cached_property
    def samples(self) -> int:
        """The number of samples in an epoch."""
        return sum(self.shard_samples)

    def steps(self, epochs: int) -> int:
        """Return the number of steps that contain `epochs` epochs.

        The last step is filled up with samples of the next epoch.
        """
        return -(-epochs * self.samples // self.batch)

    def images_per_rank(self, world: int) -> int:
        """Return the images per step and rank. Raises ValueError unless `world` divides the batch."""
        if self.batch % world:
            raise ValueError(f"a batch of {self.batch} images cannot be divided among {world} processes")
        return self.batch // world

    def _spans(self, step: int, rank: int, world: int, steps: int = 1) -> list[tuple[int, int, int]]:
        """Return the rank's share of steps as spans: epoch, first position within it, and length."""
        spans: list[tuple[int, int, int]] = []
        images = self.images_per_rank(world)
        for first in range(step, step + steps):
            position, left = first * self.batch + rank * images, images
            while left:
                epoch, start = divmod(position, self.samples)
                count = min(left, self.samples - start)
                position, left = position + count, left - count
                # Whether it continues the last span.
                if spans and spans[-1][0] == epoch and sum(spans[-1][1:]) == start:
                    start, count = spans[-1][1], spans.pop()[2] + count
                spans.append((epoch, start, count))
        return spans

    def step_samples(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Return the sample numbers of `step_batch` without its random numbers, at a fraction of the cost."""
        return self._samples_in(self._spans(step, rank, world))

    def _samples_in(self, spans: Iterable[tuple[int, int, int]]) -> np.ndarray:
        return np.concatenate([_cached_order(self, e)[start : start + count] for e, start, count in spans])

    def step_batch(self, step: int, rank: int = 0, world: int = 1, steps: int = 1) -> RankBatch:
        """Return the rank's share of a step, or of several consecutive steps joined together.

        Raises ValueError unless `world` divides the batch.
        """
        spans = self._spans(step, rank, world, steps)
        epochs = np.concatenate([np.full(count, epoch) for epoch, _, count in spans])
        if self.crop_chunk == 1:
            drawn = self._draws_in(spans)
        else:  # a chunk begins in the share of this rank or an earlier one
            whole = self._draws_in(self._spans(step, 0, 1, steps))
            images = self.images_per_rank(world)
            in_step = np.tile(np.arange(rank * images, (rank + 1) * images), steps)
            own = np.repeat(self.batch * np.arange(steps), images) + in_step
            first = own - in_step % self.crop_chunk
            drawn = Draws(whole.uniform[first], whole.mirror[first], whole.normal[own])
        return RankBatch(self._samples_in(spans), epochs, drawn)

    def step_resizes(self, step: int, rank: int = 0, world: int = 1, steps: int = 1) -> np.ndarray:
        """Return the numbers of `resize_draws` for the images of `step_batch`."""
        return np.concatenate([resize_draws(self.seed, *s) for s in self._spans(step, rank, world, steps)])

    def _draws_in(self, spans: Iterable[tuple[int, int, int]]) -> Draws:
        drawn = [draws(self.seed, *span) for span in spans]
        joined = (
            np.concatenate([getattr(span, field) for span in drawn])
            for field in ("uniform", "mirror", "normal")
        )
        return Draws(*joined)


@lru_cache(maxsize=2)
def _cached_order(plan: Plan, epoch: int) -> np.ndarray:
    return epoch_order(plan.seed, epoch, plan.shard_samples, plan.window, plan.composition)


def crop_offsets(uniform: np.ndarray, extent: np.ndarray, crop: int | np.ndarray) -> np.ndarray:
    """Return integer offsets of crops in pixels, uniform over 0 to extent − crop inclusive.

    uniform: draws in [0, 1). extent: the images' sides in pixels. A crop of 224 px from 256 px has 33
    offsets, as in the 2012 code; the paper's text counts 32 (section 4.1).
    """
    return np.floor(uniform * (extent - crop + 1)).astype(np.int64)


def share(samples: int, rank: int, world: int) -> range:
    """Return the rank's samples in an evaluation: a contiguous range; each sample is on exactly one rank."""
    return range(samples * rank // world, samples * (rank + 1) // world)
