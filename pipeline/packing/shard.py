"""Pack one shard: the unit of work, which any process on any machine can do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL

from pipeline.files import naming
from pipeline.packing.codecs import library_versions
from pipeline.packing.images import Geometry, Packed, RejectedError, check_image, pack_image
from pipeline.packing.reading import PackingError, contents
from pipeline.packing.remote_errors import shown
from pipeline.packing.shard_results import Event, ShardResult, save_result
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import Folder
from pipeline.packing.workers import say
from pipeline.retry import patiently
from pipeline.shards import INDEX_DTYPE, Sample, describe_shard, write_shard
from pipeline.versions import installed_version

DECODED = 64  # where headers are trusted, one file in this many is decoded, for the pixel statistics

Check = Literal["decode", "headers"]


def versions() -> dict[str, str]:
    """Return the versions of the software that determines the bytes of a shard."""
    return {
        "alexnet-train": installed_version("alexnet-train"),
        "pillow": PIL.__version__,
        **library_versions(),
    }


@dataclass(frozen=True)
class Recipe:
    """How each image is packed. versions: those that every worker must have."""

    geometry: Geometry
    size: int
    quality: int
    check: Check
    versions: dict[str, str]


@dataclass(frozen=True)
class ShardTask:
    """One output shard: a pure function of these fields and of the files that they name."""

    output: str
    name: str
    first_key: int
    sources: tuple[SourceImage, ...]
    measured: bool  # whether the pixels count for the mean and PCA, as those of the training split do
    recipe: Recipe
    tar: str | None = None  # a tar in the output that holds the sources and is only indexed
    table: str | None = None  # the table that names the sources; None if a folder was listed

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are in the output when the task is done."""
        return (self.tar,) if self.tar else (self.name, f"{self.name.removesuffix('.tar')}.idx")


Count = Callable[[int, int], None]  # called for each image with its packed bytes, and 1 if it was rejected


def pack_shard(task: ShardTask, count: Count = lambda size, rejected: None) -> ShardResult:
    """Pack one shard, or index one, and save its result. Raises OSError or PackingError."""
    recipe, output = task.recipe, Folder(task.output)
    if recipe.versions != versions():
        raise PackingError(
            f"a worker has {versions()}, but the run began with {recipe.versions}, which may give different "
            "bytes: install the same versions everywhere"
        )
    sums, events = PixelSums(), list[Event]()
    images = _accepted(task, sums, events, count)
    if task.tar is None:
        samples = (
            Sample(f"{key:09d}", packed.jpeg, source.label, packed.width, packed.height)
            for key, source, packed in images
        )
        with output.staged() as folder:
            shard, rows = write_shard(folder / task.name, samples)
    else:
        rows = np.array(
            [
                (0, source.offset, source.size, source.label, packed.width, packed.height)
                for _, source, packed in images
            ],
            INDEX_DTYPE,
        )
        describe = partial(describe_shard, Path(task.output), task.tar, len(rows))
        shard = patiently(describe, say) if len(rows) else None
    result = ShardResult(shard, rows, sums, events)
    save_result(output, task.name, result)
    return result


def _accepted(
    task: ShardTask, sums: PixelSums, events: list[Event], count: Count
) -> Iterator[tuple[int, SourceImage, Packed]]:
    """Yield the images that are not rejected, with their keys."""
    recipe, accepted = task.recipe, 0
    for key, (source, content) in enumerate(contents(task.sources, task.table), task.first_key):
        decode, name = recipe.check == "decode" or accepted % DECODED == 0, shown(source.path)
        try:
            with naming(source.file):  # errors of this process, such as that it has no free descriptor
                if task.tar is None:
                    packed = pack_image(content(), recipe.geometry, recipe.size, recipe.quality, decode)
                else:
                    packed = check_image(content(), recipe.size, decode)
        except MemoryError:
            raise PackingError(f"out of memory while packing {name}: try fewer --workers") from None
        except RejectedError as rejection:
            count(0, 1)
            events.append((name, "rejected", str(rejection)))
            continue
        count(len(packed.jpeg), 0)
        events.extend((name, "repaired", repair) for repair in packed.repairs)
        if task.measured and packed.pixels is not None:
            sums.add_image(packed.pixels)
        accepted += 1
        yield key, source, packed
