"""Open a packed dataset, or several as one."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.composition import Composition
from pipeline.locations import Location, location_of
from pipeline.manifest import RGB, Class, Manifest
from pipeline.mixture import combine, read_sources
from pipeline.ranks import read_ranks
from pipeline.reader import ShardReader
from pipeline.remote.options import CacheOptions, parse_size

if TYPE_CHECKING:
    from pipeline.remote.storage import RemoteStorage


class Dataset:
    """An open dataset or mixture: its manifest, and a reader for each split that is used.

    root: a folder or a URL, or FOLDER=WEIGHT,… for a mixture. mean: RGB [3], to be subtracted instead of the
    dataset's own mean, for a net that was trained on another dataset. processes: the number of processes on
    this machine that open the dataset. cache: where shards behind URLs are kept. Raises DatasetError and
    OSError as `read_sources` does. storage: what fetches these shards; None if all of them are local.

    A pickled dataset is opened again where it is unpickled.
    """

    def __init__(
        self,
        root: Location,
        mean: RGB | None = None,
        processes: int = 1,
        cache: CacheOptions = CacheOptions(),  # noqa: B008 – it cannot be changed
    ):
        self.root, self.processes = root, processes
        self.sources = read_sources(root)
        self.manifest: Manifest = combine(self.sources)
        self.fingerprint = self.manifest.fingerprint  # which does not depend on `mean`
        if mean is not None:
            pixels = self.manifest.pixels.model_copy(update={"mean": mean})
            self.manifest = self.manifest.model_copy(update={"pixels": pixels})
        self._readers: dict[str, ShardReader] = {}
        self._arguments = root, mean, processes, cache
        self.storage: RemoteStorage | None = None
        if any(isinstance(source.folder, str) for source in self.sources):
            from pipeline.remote import storage  # which imports fsspec: local datasets need not wait for it

            self.storage = storage.RemoteStorage(cache)

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Location, RGB | None, int, CacheOptions]]:
        return type(self), self._arguments

    @property
    def classes(self) -> tuple[Class, ...]:
        """The classes, each with an `id` and a `name`; a label is an index of this tuple."""
        return self.manifest.classes

    @property
    def mean(self) -> RGB:
        """The mean of the training pixels, RGB on the 0–255 scale."""
        return self.manifest.pixels.mean

    @property
    def std(self) -> RGB:
        """The standard deviations of the training pixels, RGB on the 0–255 scale."""
        pixels = self.manifest.pixels
        red, green, blue = np.sqrt(np.square(pixels.eigenvectors) @ pixels.eigenvalues).tolist()
        return red, green, blue

    def reader(self, split: str) -> ShardReader:
        """Return the reader of a split, which is opened at the first call. Raises as `ShardReader` does.

        The training images of a mixture are those of all datasets, its other splits those of the first one.
        """
        if split not in self._readers:
            self._readers[split] = self._open_reader(split)
        return self._readers[split]

    def _open_reader(self, split: str) -> ShardReader:
        mixed = self.sources if split == "train" else self.sources[:1]
        if self.storage is not None:
            from pipeline.remote.reader import RemoteShardReader

            return RemoteShardReader(
                self.storage, [(source.folder, source.manifest) for source in mixed], split, self.processes
            )
        (folder, manifest), *others = [(Path(source.folder), source.manifest) for source in mixed]
        return ShardReader(folder, manifest, split, self.processes, others)

    def composition(self, balance: float = 0.0) -> Composition | None:
        """Return the shares of datasets and classes in each epoch, or None if each image comes once.

        balance: from 0, for the classes as they are, to 1, for the same number of images of each class.
        """
        if len(self.sources) == 1 and not balance:
            return None
        samples = [source.manifest.split("train").samples for source in self.sources]
        labels = np.split(self.reader("train").rows["label"], np.cumsum(samples)[:-1])
        return Composition.of(labels, [source.share for source in self.sources], balance)


def open_dataset(
    path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None, cache_size: str | None = None
) -> Dataset:
    """Open the dataset that `alexnet-train make-shards` wrote into a folder or behind a URL.

    cache: the folder that keeps shards behind URLs; by default, one in the user's cache folder. cache_size:
    how large it may become, such as 200GB; by default, nine tenths of the disk's free space.

    Raises DatasetError if there is none or it cannot be used, OSError if it cannot be read, RanksError if
    torchrun's variables in the environment are not valid, and ValueError if `cache_size` is not a size.
    """
    size = None if cache_size is None else parse_size(cache_size)
    options = CacheOptions(None if cache is None else Path(cache), size)
    return Dataset(location_of(os.fspath(path)), processes=read_ranks().local_world_size, cache=options)
