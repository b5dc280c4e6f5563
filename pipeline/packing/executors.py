"""Who packs the shards: processes of this machine, or the workers of a Dask cluster."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.packing.shard import PackingError, ShardTask, pack_shard
from pipeline.packing.shard_results import ShardResult
from pipeline.packing.workers import WorkersError, pool, shared_array

_KEPT = "the shards that are whole are kept, and the same command continues"
_LOOK_SECONDS = 0.2  # between two looks at what is done


@dataclass
class Counts:
    """Images looked at, bytes of those packed, and how many were rejected."""

    images: int = 0
    bytes: int = 0
    rejected: int = 0

    def add(self, result: ShardResult) -> None:
        self.images += len(result.rows) + result.rejected
        self.bytes += int(result.rows["size"].sum())
        self.rejected += result.rejected


@dataclass
class Crew:
    """submit: starts `pack_shard`. width: how many tasks run at once. counts: of shards under way, too,
    where that can be seen from here."""

    submit: Callable[[ShardTask], Future[ShardResult]]
    width: Callable[[], int]
    counts: Callable[[], Counts] | None = None


def run_tasks(tasks: Sequence[ShardTask], crew: Crew, show: Callable[[Counts], None]) -> list[ShardResult]:
    """The results in the order of the tasks; `show` is called with the counts a few times a second.

    At an error no further task begins.
    """
    results: dict[int, ShardResult] = {}
    running: dict[Future[ShardResult], int] = {}
    waiting, whole = iter(enumerate(tasks)), Counts()
    try:
        while len(results) < len(tasks):
            # A task lists its files: no more are handed out than keep all hands busy.
            for _, (place, task) in zip(range(2 * crew.width() - len(running)), waiting, strict=False):
                running[crew.submit(task)] = place
            for future in wait(running, _LOOK_SECONDS, FIRST_COMPLETED).done:
                result = results[running.pop(future)] = future.result()
                whole.add(result)
            show(crew.counts() if crew.counts else whole)
    finally:
        for future in running:
            future.cancel()
    return [results[place] for place in range(len(tasks))]


@contextmanager
def processes(count: int) -> Iterator[Crew]:
    """Worker processes on this machine. Raises PackingError if they cannot be had, or one dies."""
    try:
        shared = shared_array("q", 3)
        with pool(count, _share, shared) as executor:
            yield Crew(
                lambda task: executor.submit(_pack_counting, task), lambda: count, lambda: Counts(*shared[:])
            )
    except WorkersError as error:
        raise PackingError(f"{error}; {_KEPT}") from None


_shared: Any = None  # in a worker process: the Counts of all of them, as an array


def _share(shared: Any) -> None:
    global _shared
    _shared = shared


def _pack_counting(task: ShardTask) -> ShardResult:
    def count(size: int, rejected: int) -> None:
        with _shared.get_lock():
            _shared[0] += 1
            _shared[1] += size
            _shared[2] += rejected

    return pack_shard(task, count)


@contextmanager
def dask(scheduler: str) -> Iterator[Crew]:
    """The workers of a Dask cluster; Dask gives the tasks of one that vanishes to others.

    They need this package, and the input and output at the same paths or URLs.
    """
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise PackingError("--executor dask needs Dask: pip install 'alexnet-train[dask]'") from None
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PackingError(f"--scheduler {scheduler} cannot be reached: {error}") from None
    with client:
        executor = client.get_executor(pure=False)
        try:
            yield Crew(
                lambda task: executor.submit(pack_shard, task), lambda: max(1, sum(client.ncores().values()))
            )
        except KilledWorker as error:
            raise PackingError(
                f"each of several Dask workers vanished over the same shard, perhaps for want of memory "
                f"({error}); {_KEPT}"
            ) from None
        except (CancelledError, OSError) as error:
            if isinstance(error, OSError) and client.status == "running":
                raise
            raise PackingError(f"the Dask scheduler at {scheduler} went away; {_KEPT}") from None
