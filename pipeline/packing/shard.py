"""Packing one shard: the unit of work, which any process on any machine may do."""

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

from pipeline.packing.images import Geometry, Packed, RejectedError, check_image, pack_image
from pipeline.packing.shard_results import Event, ShardResult, save_result
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import Folder, is_there, is_url, read
from pipeline.packing.workers import say
from pipeline.retry import is_outage, patiently
from pipeline.shards import INDEX_DTYPE, Sample, describe_shard, write_shard
from pipeline.versions import installed_version

READ_AHEAD = 16  # files behind URLs asked for at once: for most of the time of each, nothing comes
DECODED = 64  # one in so many is decoded where headers are believed, for mean and components

Check = Literal["decode", "headers"]


class PackingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def versions() -> dict[str, str]:
    """Of what decides the bytes of a shard."""
    return {
        "alexnet-train": installed_version("alexnet-train"),
        "pillow": PIL.__version__,
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg") or "",
    }


@dataclass(frozen=True)
class Recipe:
    """How each image is packed; `versions` are those that must do it."""

    geometry: Geometry
    size: int
    quality: int
    check: Check
    versions: dict[str, str]


@dataclass(frozen=True)
class ShardTask:
    """One output shard: a pure function of these fields and of the files named."""

    output: str
    name: str
    first_key: int
    sources: tuple[SourceImage, ...]
    measured: bool  # training pixels, of which mean and PCA are taken
    recipe: Recipe
    tar: str | None = None  # in the output, which holds the sources and is only to be indexed
    table: str | None = None  # which names the sources; without one, they were listed

    @property
    def files(self) -> tuple[str, ...]:
        """What is in the output when it is done."""
        return (self.tar,) if self.tar else (self.name, f"{self.name.removesuffix('.tar')}.idx")


Count = Callable[[int, int], None]  # called for each image with its packed bytes and 1 if it is rejected


def pack_shard(task: ShardTask, count: Count = lambda size, rejected: None) -> ShardResult:
    """Pack one shard, or index one, and leave its record beside it. Raises OSError or PackingError."""
    recipe, output = task.recipe, Folder(task.output)
    if recipe.versions != versions():
        raise PackingError(
            f"a worker has {versions()}, but the run began with {recipe.versions}, which may pack to "
            "other bytes: install the same versions everywhere"
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
        places = [
            (0, source.offset, source.size, source.label, packed.width, packed.height)
            for _, source, packed in images
        ]
        rows = np.array(places, INDEX_DTYPE)
        describe = partial(describe_shard, Path(task.output), task.tar, len(places))
        shard = patiently(describe, say) if places else None
    result = ShardResult(shard, rows, sums, events)
    save_result(output, task.name, result)
    return result


def _accepted(
    task: ShardTask, sums: PixelSums, events: list[Event], count: Count
) -> Iterator[tuple[int, SourceImage, Packed]]:
    """The images that are not rejected, by key."""
    recipe, accepted = task.recipe, 0
    for key, (source, content) in enumerate(_contents(task.sources, task.table), task.first_key):
        decode = recipe.check == "decode" or accepted % DECODED == 0
        try:
            if task.tar is None:
                packed = pack_image(content(), recipe.geometry, recipe.size, recipe.quality, decode)
            else:
                packed = check_image(content(), recipe.size, decode)
        except MemoryError:
            raise PackingError(f"memory ran out over {source.path}: try fewer --workers") from None
        except RejectedError as rejection:
            count(0, 1)
            events.append((source.path, "rejected", str(rejection)))
            continue
        count(len(packed.jpeg), 0)
        events.extend((source.path, "repaired", repair) for repair in packed.repairs)
        if task.measured and packed.pixels is not None:
            sums.add_image(packed.pixels)
        accepted += 1
        yield key, source, packed


def _contents(
    sources: tuple[SourceImage, ...], table: str | None = None
) -> Iterator[tuple[SourceImage, Callable[[], bytes]]]:
    """Each source with what hands over its bytes; those behind URLs are read ahead."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:  # its threads start when there is something for them
        ahead: deque[tuple[SourceImage, Callable[[], bytes]]] = deque()
        for source in sources:
            content = partial(_read, source, table)
            ahead.append((source, pool.submit(content).result if is_url(source.file) else content))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
        yield from ahead


def _read(source: SourceImage, table: str | None) -> bytes:
    """Raises RejectedError where the file is to blame, and else OSError or PackingError."""
    try:
        if not is_url(source.file) and not patiently(partial(_is_regular, source.file), say):
            raise RejectedError("unreadable")
        return read(source.file, source.offset, source.size)
    except OSError as error:
        if is_outage(error):
            raise
        _check_storage(source, table, error)
        raise RejectedError("unreadable") from None


def _is_regular(file: str) -> bool:
    """A pipe, say, would be read for ever."""
    return stat.S_ISREG(os.stat(file).st_mode)  # noqa: PTH116 – Path takes three times as long


def _check_storage(source: SourceImage, table: str | None, error: OSError) -> None:
    """Raise PackingError where not this file alone is missing, but where it was found, or all of its tar."""
    place = table or source.file.rpartition("/")[0]
    if not is_there(place):
        why = f"neither can {place} be, or it is empty: has its storage gone away?"
    elif source.size is not None and error.errno != errno.EIO:
        why = "it holds other images, too."
    else:
        return
    raise PackingError(
        f"{source.file} cannot be read ({error.strerror or error}), and {why} The shards that are whole are "
        "kept: mend the cause and give the same command, which continues"
    ) from None
