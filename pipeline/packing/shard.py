"""Pack one shard, which is the unit of work that any process on any machine can do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL

from pipeline import __version__
from pipeline.files import path_in_errors
from pipeline.packing.codecs import library_versions
from pipeline.packing.contents import PackingError, contents
from pipeline.packing.images import Geometry, PackedImage, RejectedError, check_image, pack_image
from pipeline.packing.shard_results import Event, ShardResult, save_result
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import Folder
from pipeline.packing.workers import warn
from pipeline.remote_errors import redact
from pipeline.retry import with_retries
from pipeline.shards import INDEX_DTYPE, Sample, checksum, checksum_array, describe_shard, write_shard

DECODE_EVERY = 64  # if headers are trusted, one file in this many is decoded, for the pixel statistics

Check = Literal["decode", "headers"]


def versions() -> dict[str, str]:
    """Return the versions of the software that determines the bytes of a shard."""
    return {
        "alexnet-train": __version__,
        "pillow": PIL.__version__,
        **library_versions(),
    }


@dataclass(frozen=True)
class ImageOptions:
    """How each image is packed. versions: the software versions that every worker must have."""

    geometry: Geometry
    size: int
    quality: int
    check: Check
    versions: dict[str, str]


@dataclass(frozen=True)
class ShardTask:
    """A shard to pack. Its bytes depend only on these fields and on the source files.

    output: path or URL of the dataset's folder. name: the shard's file name. first_key: the key of the first
    source, from which the others are numbered.
    """

    output: str
    name: str
    first_key: int
    sources: tuple[SourceImage, ...]
    in_statistics: bool  # whether the pixels count towards the mean and PCA: only those of the training split
    image_options: ImageOptions
    tar: str | None = None  # the tar in the output that holds the sources, if it is only indexed
    table: str | None = None  # the table that names the sources; None if a folder was listed

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that the task leaves in the output."""
        return (self.tar,) if self.tar else (self.name, f"{self.name.removesuffix('.tar')}.idx")


Count = Callable[[int, int], None]  # called for each image with its packed bytes, and 1 if it is rejected


def pack_shard(task: ShardTask, count: Count = lambda size, rejected: None) -> ShardResult:
    """Pack or index one shard, save its result and return it.

    count: called for each image. Raises OSError if the storage fails, and PackingError if the versions
    differ, memory runs out or the input disappears.
    """
    image_options, output = task.image_options, Folder(task.output)
    if image_options.versions != versions():
        raise PackingError(
            f"a worker has {versions()}, but the run began with {image_options.versions}, which may give "
            "different bytes: install the same versions everywhere"
        )
    sums, events, checksums = PixelSums(), list[Event](), list[bytes]()
    images = _accepted_images(task, sums, events, checksums, count)
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
        shard = with_retries(describe, warn) if len(rows) else None
    result = ShardResult(shard, rows, checksum_array(checksums), sums, events)
    save_result(output, task.name, result)
    return result


def _accepted_images(
    task: ShardTask, sums: PixelSums, events: list[Event], checksums: list[bytes], count: Count
) -> Iterator[tuple[int, SourceImage, PackedImage]]:
    """Yield the images that are not rejected, with their keys.

    Adds pixels to `sums`, repaired and rejected files to `events`, and the checksums of the images that it
    yields to `checksums`, and calls `count` for each image.
    """
    image_options, accepted = task.image_options, 0
    for key, (source, content) in enumerate(contents(task.sources, task.table), task.first_key):
        decode = image_options.check == "decode" or accepted % DECODE_EVERY == 0
        name = redact(source.path)
        try:
            with path_in_errors(source.file):  # for errors of the process, such as a lack of descriptors
                if task.tar is None:
                    packed = pack_image(
                        content(), image_options.geometry, image_options.size, image_options.quality, decode
                    )
                else:
                    packed = check_image(content(), image_options.size, decode)
        except MemoryError:
            raise PackingError(f"out of memory while packing {name}: try fewer --workers") from None
        except RejectedError as rejection:
            count(0, 1)
            events.append((name, "rejected", str(rejection)))
            continue
        count(len(packed.jpeg), 0)
        events.extend((name, "repaired", repair) for repair in packed.repairs)
        if task.in_statistics and packed.pixels is not None:
            sums.add_image(packed.pixels)
        checksums.append(checksum(packed.jpeg))
        accepted += 1
        yield key, source, packed
