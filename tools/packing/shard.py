"""Packing one shard: the unit of work, which any process on any machine may do."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import PIL
from PIL import features

from pipeline.shards import Sample, write_shard
from tools.inputs.sources import Source
from tools.packing.images import Geometry, RejectedError, pack_image
from tools.packing.pixel_sums import PixelSums
from tools.packing.results import Result, save_result
from tools.storage import Folder, is_url, read

READ_AHEAD = 16  # files behind URLs asked for at once: for most of the time of each, nothing comes


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


Count = Callable[[int, int], None]  # called for each image with its packed bytes and 1 if it is rejected


def pack_shard(task: Task, count: Count = lambda size, rejected: None) -> Result:
    """Pack one shard and leave its record beside it. Raises OSError or PackingError."""
    recipe, output = task.recipe, Folder(task.output)
    if recipe.versions != versions():
        raise PackingError(
            f"a worker has {versions()}, but the run began with {recipe.versions}, which may pack to "
            "other bytes: install the same versions everywhere"
        )
    sums, events = PixelSums(), []

    def samples() -> Iterator[Sample]:
        for key, (source, content) in enumerate(_contents(task.sources), task.first_key):
            try:
                packed = pack_image(content(), recipe.geometry, recipe.size, recipe.quality)
            except RejectedError as rejection:
                count(0, 1)
                events.append((source.path, "rejected", str(rejection)))
                continue
            count(len(packed.jpeg), 0)
            events.extend((source.path, "repaired", repair) for repair in packed.repairs)
            if task.measured:
                sums.add_image(packed.pixels)
            yield Sample(f"{key:09d}", packed.jpeg, source.label, packed.width, packed.height)

    with output.staged() as folder:
        shard, rows = write_shard(folder / task.name, samples())
    result = Result(shard, rows, sums, events)
    save_result(output, task.name, result)
    return result


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
    if not Path(source.file).is_file():  # a pipe, say, which would be read for ever
        raise RejectedError("unreadable")
    try:
        return read(source.file, source.offset, source.size)
    except OSError:
        raise RejectedError("unreadable") from None
