"""Packing one shard: the unit of work, which any process on any machine may do."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from PIL import features

from pipeline.shards import INDEX_DTYPE, Sample, describe_shard, write_shard
from tools.inputs.sources import Source
from tools.packing.images import Geometry, Packed, RejectedError, check_image, pack_image
from tools.packing.pixel_sums import PixelSums
from tools.packing.results import Event, Result, save_result
from tools.storage import Folder, is_url, read

READ_AHEAD = 16  # files behind URLs asked for at once: for most of the time of each, nothing comes
DECODED = 64  # one in so many is decoded where headers are believed, for mean and components

Check = Literal["decode", "headers"]


class PackingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def versions() -> dict[str, str]:
    """Of what decides the bytes of a shard."""
    return {
        "alexnet-train": version("alexnet-train"),
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
class Task:
    """One output shard: a pure function of these fields and of the files named."""

    output: str
    name: str
    first_key: int
    sources: tuple[Source, ...]
    measured: bool  # training pixels, of which mean and PCA are taken
    recipe: Recipe
    tar: str | None = None  # in the output, which holds the sources and is only to be indexed

    @property
    def files(self) -> tuple[str, ...]:
        """What is in the output when it is done."""
        return (self.tar,) if self.tar else (self.name, f"{self.name.removesuffix('.tar')}.idx")


Count = Callable[[int, int], None]  # called for each image with its packed bytes and 1 if it is rejected


def pack_shard(task: Task, count: Count = lambda size, rejected: None) -> Result:
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
        shard = describe_shard(Path(task.output), task.tar, len(places)) if places else None
    result = Result(shard, rows, sums, events)
    save_result(output, task.name, result)
    return result


def _accepted(
    task: Task, sums: PixelSums, events: list[Event], count: Count
) -> Iterator[tuple[int, Source, Packed]]:
    """The images that are not rejected, by key."""
    recipe, accepted = task.recipe, 0
    for key, (source, content) in enumerate(_contents(task.sources), task.first_key):
        decode = recipe.check == "decode" or accepted % DECODED == 0
        try:
            if task.tar is None:
                packed = pack_image(content(), recipe.geometry, recipe.size, recipe.quality, decode)
            else:
                packed = check_image(content(), recipe.size, decode)
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


def _contents(sources: tuple[Source, ...]) -> Iterator[tuple[Source, Callable[[], bytes]]]:
    """Each source with what hands over its bytes; those behind URLs are read ahead."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:  # its threads start when there is something for them
        ahead: deque[tuple[Source, Callable[[], bytes]]] = deque()
        for source in sources:
            remote = is_url(source.file)
            ahead.append((source, pool.submit(_read, source).result if remote else partial(_read, source)))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
        yield from ahead


def _read(source: Source) -> bytes:
    """Raises RejectedError, or OSError where not the file but the way to it is broken."""
    if is_url(source.file):
        try:
            return read(source.file, source.offset, source.size)
        except (FileNotFoundError, PermissionError):
            raise RejectedError("unreadable") from None
    if not os.path.isfile(source.file):  # noqa: PTH113 – a pipe, say, is read for ever; Path takes 3 times as long
        raise RejectedError("unreadable")
    try:
        return read(source.file, source.offset, source.size)
    except OSError:
        raise RejectedError("unreadable") from None
