"""The loader of training batches for any loop: docs/loader.md explains it with examples."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Unpack

from pipeline.checked import OnDamage
from pipeline.closable import Closable
from pipeline.dataset import Dataset
from pipeline.loader import Batch, graph_options, train_loader
from pipeline.loader_options import (
    DecodingOptions,
    LoaderError,
    check_augmentation,
    check_balance,
    find_ranks,
    make_decoding,
    normalisation,
)
from pipeline.plan import Plan


class Loader(Closable):
    """Loads the training batches of an endless sequence, in which epoch follows epoch without a gap.

    Which image comes when, and its crop, mirror and colour, depend only on (seed, epoch, position), and not
    on the number of processes or on where a run was continued.

    A batch is (pixels, labels) on the loader's device. pixels: [n,3,crop,crop] in channels_last format, where
    n is `batch` divided by the number of processes. labels: int64 [n].

    batch: images in a step over all processes. crop: side in pixels. mean, std: RGB on the 0–255 scale; each
    pixel becomes (pixel − mean) / std. By default, the mean is that of the dataset, and std is 1. seed: a
    whole number from 0. scale, ratio: if `scale` is given, crops are random resized crops as in torchvision,
    with these bounds of the share of the area and of width divided by height; otherwise they are parts of
    `crop` pixels at a random position. crops_and_flips: if false, each image is its centre crop. colour,
    colour_epochs: colour noise as in the AlexNet paper, `paper` or `code2012`, and after how many epochs it
    ends. shuffle_window: number of shards that are shuffled together, or 0 for all. crop_chunk: number of
    consecutive images that share crop and mirror. balance: from 0, for the classes as they are, to 1, for
    the same number of images of each class in an epoch (docs/operations.md). on_damage: called with each
    damaged sample, whose place the next one takes; without it, damage raises DatasetError. rank, world: index
    of this process and number of processes; by default those of torch.distributed or, before it is
    initialised, of torchrun's environment.

    Raises LoaderError if an argument cannot be used, DatasetError if the dataset cannot, and OutageError, a
    DatasetError, if the storage fails.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        crop: int = 224,
        *,
        seed: int = 0,
        split: str = "train",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crops_and_flips: bool = True,
        colour: str = "off",
        colour_epochs: int | None = None,
        shuffle_window: int = 0,
        crop_chunk: int = 1,
        balance: float = 0.0,
        on_damage: OnDamage | None = None,
        rank: int | None = None,
        world: int | None = None,
        **decoding: Unpack[DecodingOptions],
    ):
        super().__init__()
        check_balance(balance, split)
        ranks = find_ranks(rank, world)
        composition = dataset.composition(balance) if split == "train" else None
        shards = dataset.manifest.split(split).shards
        try:
            self.plan = Plan(
                seed=seed,
                batch=batch,
                shard_samples=tuple(shard.samples for shard in shards),
                window=shuffle_window,
                crop_chunk=crop_chunk,
                composition=composition,
            )
            images = self.plan.images_per_rank(ranks.world_size)
        except ValueError as error:
            raise LoaderError(str(error)) from None
        check_augmentation(seed, scale, ratio, colour, crop_chunk)
        self.dataset, self.split, self.balance = dataset, split, balance
        self.decoding = make_decoding(crop, ranks, **decoding)
        self._options: dict[str, Any] = {
            "split": split,
            "scale": scale,
            "ratio": ratio,
            "crops_and_flips": crops_and_flips,
            "colour": colour,
            "colour_epochs": colour_epochs,
            "rank": ranks.rank,
            "world": ranks.world_size,
            "on_damage": on_damage,
            **normalisation(mean, std, self.decoding),
        }
        # Opening the split finds a damaged dataset now.
        dataset.reader(split).check_window(shuffle_window, ranks.rank, ranks.world_size)
        graph_options(dataset.manifest, self.decoding, images, crops_and_flips and scale is not None)
        self.step = 0  # of the batch that follows the last one that was taken
        self._resumed = 0  # step at which the loaded state continues
        self._stream_step = 0  # the step that the stream gives next

    @property
    def batch(self) -> int:
        """The number of images in a step over all processes."""
        return self.plan.batch

    @property
    def samples(self) -> int:
        """The number of images in an epoch."""
        return self.plan.samples

    def __len__(self) -> int:
        """The number of batches in the first epoch. A later one may have one fewer: `len(epoch(n))`."""
        return self.steps(1)

    def steps(self, epochs: int) -> int:
        """Return the number of batches in a number of epochs."""
        return self.plan.steps(epochs)

    @property
    def current_epoch(self) -> int:
        """The epoch of the batch that follows the last one that was taken."""
        return self.step * self.batch // self.samples

    def epoch(self, number: int) -> "Batches":
        """Return the batches of an epoch, counted from 0; after `load_state_dict`, those not yet taken.

        Epochs follow without a gap: the last batch of an epoch is filled up with the first images of the
        next one, which then are not repeated.
        """
        if number < 0:
            raise LoaderError(f"epochs are counted from 0, so there is no epoch {number}")
        return self.batches(max(self.steps(number), self._resumed), self.steps(number + 1))

    def batches(self, start: int, stop: int = sys.maxsize) -> "Batches":
        """Return the batches of the steps start to stop − 1, whatever their epoch."""
        return Batches(self, range(start, stop))

    def take(self, step: int) -> Batch:
        """Return the batch of a step. It is fastest if steps are taken in order."""
        self._check_is_usable()
        if self._stream is None or self._stream_step != step:
            self._stream = None  # ends its threads before others start
            self._stream = train_loader(
                self.dataset, self.plan, range(step, sys.maxsize), self.decoding, **self._options
            )
        try:
            batch = next(self._stream)
        except BaseException:
            self._stream = None
            raise
        self.step = self._stream_step = step + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch that was taken: its step and the identity of the sequence.

        It holds only numbers and text, and is the same in all processes.
        """
        return {"step": self.step, "dataset": self.dataset.fingerprint, "plan": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch of a state, with any number of processes.

        Raises LoaderError if the state is that of another dataset, seed, batch or shuffle.
        """
        try:
            step, dataset, plan = state["step"], state["dataset"], dict(state["plan"])
        except (LookupError, TypeError, ValueError):
            raise LoaderError("this is not the state of a loader, as state_dict() returns it") from None
        if not isinstance(step, int) or step < 0:
            raise LoaderError(f"the state's step is {step!r}, but it should be a whole number from 0")
        if dataset != self.dataset.fingerprint:
            raise LoaderError(
                f"the state belongs to another dataset ({dataset}) than {self.dataset.root} "
                f"({self.dataset.fingerprint}): open the dataset that it was saved with"
            )
        ours = self._identity()
        for name in {**ours, **plan}:
            if plan.get(name) != ours.get(name):
                raise LoaderError(
                    f"the state belongs to a loader with {name}={plan.get(name)!r}, but this one has "
                    f"{name}={ours.get(name)!r}: create the loader as it was when the state was saved"
                )
        self.step = self._resumed = step

    def _identity(self) -> dict[str, Any]:
        """Return what the order and the draws depend on, besides the dataset."""
        plan = {field.name: getattr(self.plan, field.name) for field in fields(Plan)}
        del plan["shard_samples"], plan["composition"]  # which follow from the dataset and the balance
        return {"split": self.split, "balance": self.balance, **plan}


class Batches:
    """The batches of consecutive steps of a loader; each iteration begins at the first one."""

    def __init__(self, loader: Loader, steps: range):
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._loader.take, self._steps)
