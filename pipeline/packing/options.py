"""Define the options of packing a dataset."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.machine import cpus
from pipeline.manifest import Geometry
from pipeline.packing.shard import Check


@dataclass(frozen=True)
class PackingOptions:
    """The options of `pack`, which are also those of `make-shards`.

    input: a folder or a table, on this machine or behind a URL. output: a folder or a URL; with in_place,
    the input. in_place: index the tars of the input where they are, and write no shards. geometry: how images
    are resized and cropped. size: the shorter side after resizing, in pixels. quality: JPEG quality, 1 to
    100. check: `decode` to decode files that are kept unchanged, or `headers` to trust their headers.
    val_fraction: the fraction of each class that becomes the validation split, if the input has none.
    class_names: a file with a class id and a readable name on each line. shard_samples: the largest number of
    images in a shard. seed: the seed of the order of the images and of the validation split. workers: number
    of processes. scheduler: the address of a Dask scheduler, whose workers are used instead of processes.
    overwrite: replace the dataset in the output, if there is one.
    """

    input: str
    output: str
    in_place: bool = False
    geometry: Geometry = "256"
    size: int = 256
    quality: int = 90
    check: Check = "decode"
    val_fraction: float | None = None
    class_names: Path | None = None
    shard_samples: int = 1000
    seed: int = 0
    workers: int = field(default_factory=cpus)
    scheduler: str | None = None
    overwrite: bool = False
