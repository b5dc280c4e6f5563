"""The loader of a split's images in order, for evaluation in any loop: docs/loader.md explains it."""

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from pipeline.checked import OnDamage
from pipeline.closable import Closable
from pipeline.dataset import Dataset
from pipeline.loader import Batch, evaluation_loader, graph_options
from pipeline.loader_options import DecodingOptions, LoaderError, find_ranks, make_decoding, normalisation
from pipeline.plan import share


class EvaluationLoader(Closable):
    """Loads the centre crops of a split in order, each image once over all processes.

    Each iteration is one pass. A batch is (pixels, labels), as those of `Loader`; the last one may be
    smaller, and a process may have fewer batches than another.

    batch: images in a batch of this process. crops: 1 for the centre, or 10 for the corners and the centre,
    also mirrored, for which pixels are [n,10,3,crop,crop]. on_damage: called with each damaged sample, which
    is then missing. Other arguments and errors are those of `Loader`. samples: the numbers of the
    images in the batch that was yielded last, int64 [n].
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        crop: int = 224,
        *,
        split: str = "val",
        crops: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        on_damage: OnDamage | None = None,
        rank: int | None = None,
        world: int | None = None,
        **decoding: Unpack[DecodingOptions],
    ):
        if batch < 1:
            raise LoaderError(f"the batch must have 1 image or more, not {batch}")
        if crops not in (1, 10):
            raise LoaderError(f"crops must be 1 or 10, not {crops}")
        super().__init__()
        self.samples = np.array([], np.int64)
        ranks = find_ranks(rank, world)
        self.dataset, self.split, self.batch = dataset, split, batch
        self.decoding = make_decoding(crop, ranks, **decoding)
        self._options: dict[str, Any] = {
            "crops": crops,
            "rank": ranks.rank,
            "world": ranks.world_size,
            "on_damage": on_damage,
            **normalisation(mean, std, self.decoding),
        }
        self._images = len(share(len(dataset.reader(split)), ranks.rank, ranks.world_size))
        graph_options(dataset.manifest, self.decoding, batch)

    def __len__(self) -> int:
        """The number of this process's batches, if no sample is damaged."""
        return len(range(0, self._images, self.batch))

    def __iter__(self) -> Iterator[Batch]:
        self._check_is_usable()
        # An iteration owns the stream, and leaves it to the next one when it is complete.
        stream, self._stream = self._stream, None
        if stream is None:
            stream = evaluation_loader(
                self.dataset, self.split, self.batch, self.decoding, persistent=True, **self._options
            )
        for batch in stream:
            self.samples = stream.samples
            yield batch
        if not self._is_closed:
            self._stream = stream
