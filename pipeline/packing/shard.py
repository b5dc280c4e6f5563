"""Pack one shard, which is the unit of work that any process on any machine can do."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from PIL import features

from pipeline.packing.images import Geometry, PackedImage, RejectedError, check_image, pack_image
from pipeline.packing.shard_results import Event, ShardResult, save_result
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import Folder, is_accessible, is_url, read
from pipeline.packing.workers import warn
from pipeline.retry import is_outage, with_retries
from pipeline.shards import INDEX_DTYPE, Sample, describe_shard, write_shard
from pipeline.versions import installed_version

READ_AHEAD = 16  # number of files behind URLs that are requested at once, because requests mostly wait
DECODE_EVERY = 64  # if headers are trusted, one file in this many is decoded, for the pixel statistics

Check = Literal["decode", "headers"]


class PackingError(RuntimeError):
    """A packing run cannot continue; the message says why and what to do."""


def versions() -> dict[str, str]:
    """Return the versions of the software that determines the bytes of a shard."""
    return {
        "alexnet-train": installed_version("alexnet-train"),
        "pillow": PIL.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg") or "",
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
    sums, events = PixelSums(), list[Event]()
    images = _accepted_images(task, sums, events, count)
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
    result = ShardResult(shard, rows, sums, events)
    save_result(output, task.name, result)
    return result


def _accepted_images(
    task: ShardTask, sums: PixelSums, events: list[Event], count: Count
) -> Iterator[tuple[int, SourceImage, PackedImage]]:
    """Yield the images that are not rejected, with their keys.

    Adds pixels to `sums` and repaired and rejected files to `events`, and calls `count` for each image.
    """
    image_options, accepted = task.image_options, 0
    for key, (source, content) in enumerate(_contents(task.sources, task.table), task.first_key):
        decode = image_options.check == "decode" or accepted % DECODE_EVERY == 0
        try:
            if task.tar is None:
                packed = pack_image(
                    content(), image_options.geometry, image_options.size, image_options.quality, decode
                )
            else:
                packed = check_image(content(), image_options.size, decode)
        except MemoryError:
            raise PackingError(f"out of memory while packing {source.path}: try fewer --workers") from None
        except RejectedError as rejection:
            count(0, 1)
            events.append((source.path, "rejected", str(rejection)))
            continue
        count(len(packed.jpeg), 0)
        events.extend((source.path, "repaired", repair) for repair in packed.repairs)
        if task.in_statistics and packed.pixels is not None:
            sums.add_image(packed.pixels)
        accepted += 1
        yield key, source, packed


def _contents(
    sources: tuple[SourceImage, ...], table: str | None = None
) -> Iterator[tuple[SourceImage, Callable[[], bytes]]]:
    """Yield each source with a function that returns its bytes; sources behind URLs are read ahead."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:  # it starts threads only when they are needed
        ahead: deque[tuple[SourceImage, Callable[[], bytes]]] = deque()
        for source in sources:
            content = partial(_read, source, table)
            ahead.append((source, pool.submit(content).result if is_url(source.file) else content))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
        yield from ahead


def _read(source: SourceImage, table: str | None) -> bytes:
    """Read an image file.

    Raises RejectedError if the file is at fault, OSError in an outage, and PackingError if more than this
    file is missing.
    """
    try:
        if not is_url(source.file) and not with_retries(partial(_is_regular, source.file), warn):
            raise RejectedError("unreadable")
        return read(source.file, source.offset, source.size)
    except OSError as error:
        if is_outage(error):
            raise
        _check_storage(source, table, error)
        raise RejectedError("unreadable") from None


def _is_regular(file: str) -> bool:
    """Return whether a file is a regular one; reading a pipe, for example, might never end."""
    return stat.S_ISREG(os.stat(file).st_mode)  # noqa: PTH116 – Path.stat takes three times as long


def _check_storage(source: SourceImage, table: str | None, error: OSError) -> None:
    """Raise PackingError if the file is missing together with its folder, table or tar."""
    origin = table or source.file.rpartition("/")[0]
    if not is_accessible(origin):
        why = f"{origin} cannot be read or is empty: is its storage still mounted?"
    elif source.size is not None and error.errno != errno.EIO:
        why = "it contains other images too."
    else:
        return
    raise PackingError(
        f"{source.file} cannot be read ({error.strerror or error}), and {why} Finished shards are kept: "
        "fix the cause and run the same command again to continue"
    ) from None
