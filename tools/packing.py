"""Packing one shard, and packing many in parallel processes."""

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.manifest import Shard
from pipeline.shards import Sample, write_shard
from tools.images import Geometry, RejectedError, pack_image
from tools.pixel_sums import PixelSums
from tools.sources import Source


@dataclass(frozen=True)
class Task:
    """One output shard: a pure function of these fields and of the files named."""

    input: Path
    path: Path
    first_key: int
    sources: tuple[Source, ...]
    measured: bool  # training pixels, of which mean and PCA are taken
    geometry: Geometry
    size: int
    quality: int


@dataclass(frozen=True)
class Result:
    """What came of a task. events: (path, `repaired` or `rejected`, reason)."""

    shard: Shard | None
    rows: np.ndarray
    sums: PixelSums
    events: list[tuple[str, str, str]]


_done = None  # in a worker: how many files all workers together are through with


def _start_worker(done) -> None:
    global _done
    _done = done


def pack_shard(task: Task) -> Result:
    """Pack one shard; this is what runs in the worker processes."""
    sums, events = PixelSums(), []

    def samples() -> Iterator[Sample]:
        for key, source in enumerate(task.sources, task.first_key):
            if _done is not None:
                with _done.get_lock():
                    _done.value += 1
            try:
                packed = pack_image(_read(task.input / source.path), task.geometry, task.size, task.quality)
            except RejectedError as rejection:
                events.append((source.path, "rejected", str(rejection)))
                continue
            events.extend((source.path, "repaired", repair) for repair in packed.repairs)
            if task.measured:
                sums.add_image(packed.pixels)
            yield Sample(f"{key:09d}", packed.jpeg, source.label, packed.width, packed.height)

    shard, rows = write_shard(task.path, samples())
    return Result(shard, rows, sums, events)


def _read(path: Path) -> bytes:
    if not path.is_file():  # a pipe, say, which would be read for ever
        raise RejectedError("unreadable")
    try:
        return path.read_bytes()
    except OSError:
        raise RejectedError("unreadable") from None


def run_tasks(tasks: list[Task], workers: int) -> list[Result]:
    """The results in the order of the tasks, with a progress bar on a terminal."""
    # Spawned, not forked: the bar has a thread, and what it locks would stay locked in a child.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images,"),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (done,)) as pool,
    ):
        bar = progress.add_task("", total=sum(len(task.sources) for task in tasks))
        futures = [pool.submit(pack_shard, task) for task in tasks]
        pending: set[Future] = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()  # an error ends the run here, not after all other shards
                progress.update(bar, completed=done.value)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
