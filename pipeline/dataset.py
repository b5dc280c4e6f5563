"""Open a packed dataset, or several as one."""

import os
from pathlib import Path

import numpy as np

from pipeline.composition import Composition
from pipeline.manifest import RGB, Class, Manifest
from pipeline.mixture import combine, read_sources
from pipeline.ranks import read_ranks
from pipeline.reader import ShardReader


class Dataset:
    """An open dataset or mixture: its manifest, and a reader for each split that is used.

    root: a folder, or FOLDER=WEIGHT,… for a mixture. mean: RGB [3], to be subtracted instead of the dataset's
    own mean, for a net that was trained on another dataset. processes: the number of processes on this
    machine that open the dataset. Raises DatasetError and OSError as `read_sources` does.

    A pickled dataset is opened again where it is unpickled.
    """

    def __init__(self, root: Path, mean: RGB | None = None, processes: int = 1):
        self.root, self.processes = root, processes
        self.sources = read_sources(root)
        self.manifest: Manifest = combine(self.sources)
        self.fingerprint = self.manifest.fingerprint  # which does not depend on `mean`
        if mean is not None:
            pixels = self.manifest.pixels.model_copy(update={"mean": mean})
            self.manifest = self.manifest.model_copy(update={"pixels": pixels})
        self._readers: dict[str, ShardReader] = {}
        self._arguments = root, mean, processes

    def __reduce__(self) -> tuple[type["Dataset"], tuple[Path, RGB | None, int]]:
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
            (folder, manifest, _), *others = self.sources
            mixed = [(other.folder, other.manifest) for other in others] if split == "train" else []
            self._readers[split] = ShardReader(folder, manifest, split, self.processes, mixed)
        return self._readers[split]

    def composition(self, balance: float = 0.0) -> Composition | None:
        """Return the shares of datasets and classes in each epoch, or None if each image comes once.

        balance: from 0, for the classes as they are, to 1, for equally many images of each class.
        """
        if len(self.sources) == 1 and not balance:
            return None
        samples = [source.manifest.split("train").samples for source in self.sources]
        labels = np.split(self.reader("train").rows["label"], np.cumsum(samples)[:-1])
        return Composition.of(labels, [source.share for source in self.sources], balance)


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Open the dataset that `alexnet-train make-shards` wrote into a folder.

    Raises DatasetError if there is none or it cannot be used, OSError if it cannot be read, and RanksError if
    torchrun's variables in the environment are not valid.
    """
    return Dataset(Path(path), processes=read_ranks().local_world_size)
