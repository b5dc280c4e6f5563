"""The options of packing a dataset."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.machine import cpus
from pipeline.manifest import Geometry
from pipeline.packing.shard import Check


@dataclass(frozen=True)
class PackingOptions:
    """The options of `pack`, which are also those of `make-shards`.

    input: a folder, a table or a URL. output: a folder or a URL; with in_place it is the input.
    in_place: whether the tars of the input are indexed where they are, and no shards are written.
    geometry: how images are resized and cropped. size: of the shorter side, in pixels. quality: of the
    JPEGs, from 1 to 100. check: whether files that are kept unchanged are decoded. val_fraction: the
    share of each class that becomes the validation split, where the input has none. class_names: a file
    with a class folder's name and a readable name on each line. shard_samples: the largest number of
    images in a shard. seed: of the order of images. workers: the number of processes. scheduler: the
    address of a Dask cluster, whose workers take the place of processes. overwrite: whether the dataset
    that the output holds is replaced.
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
