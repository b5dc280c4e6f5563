"""Run packing tasks in processes on this machine, or on the workers of a Dask cluster."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.packing.shard import PackingError, ShardTask, pack_shard
from pipeline.packing.shard_results import ShardResult
from pipeline.packing.workers import WorkersError, pool, shared_array

_RESUMABLE = "finished shards are kept: run the same command again to continue"
_POLL_SECONDS = 0.2  # between checks for finished tasks


@dataclass
class Counts:
    """Images processed, bytes packed, and images rejected."""

    images: int = 0
    bytes: int = 0
    rejected: int = 0

    def add(self, result: ShardResult) -> None:
        self.images += len(result.rows) + result.rejected
        self.bytes += int(result.rows["size"].sum())
        self.rejected += result.rejected


@dataclass
class Executor:
    """Workers that pack shards.

    submit: starts `pack_shard`. concurrency: the number of tasks that run at once. counts: the counts so far,
    including unfinished shards, where this process can see them.
    """

    submit: Callable[[ShardTask], Future[ShardResult]]
    concurrency: Callable[[], int]
    counts: Callable[[], Counts] | None = None


def run_tasks(
    tasks: Sequence[ShardTask], executor: Executor, show: Callable[[Counts], None]
) -> list[ShardResult]:
    """Run the tasks and return their results in order; call `show` with the counts a few times a second.

    After an error, no further task starts.
    """
    results: dict[int, ShardResult] = {}
    running: dict[Future[ShardResult], int] = {}
    waiting, finished = iter(enumerate(tasks)), Counts()
    try:
        while len(results) < len(tasks):
            # Tasks are large, as each lists its files: submit only enough to keep all workers busy.
            for _, (index, task) in zip(
                range(2 * executor.concurrency() - len(running)), waiting, strict=False
            ):
                running[executor.submit(task)] = index
            for future in wait(running, _POLL_SECONDS, FIRST_COMPLETED).done:
                result = results[running.pop(future)] = future.result()
                finished.add(result)
            show(executor.counts() if executor.counts else finished)
    finally:
        for future in running:
            future.cancel()
    return [results[index] for index in range(len(tasks))]


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Start worker processes on this machine. Raises PackingError if they cannot be started or one dies."""
    try:
        shared = shared_array("q", 3)
        with pool(count, _set_shared_counts, shared) as executor:
            yield Executor(
                lambda task: executor.submit(_pack_counting, task), lambda: count, lambda: Counts(*shared[:])
            )
    except WorkersError as error:
        raise PackingError(f"{error}; {_RESUMABLE}") from None


_shared_counts: Any = None  # in a worker process: an array with the Counts over all workers


def _set_shared_counts(shared: Any) -> None:
    global _shared_counts
    _shared_counts = shared


def _pack_counting(task: ShardTask) -> ShardResult:
    def count(size: int, rejected: int) -> None:
        with _shared_counts.get_lock():
            _shared_counts[0] += 1
            _shared_counts[1] += size
            _shared_counts[2] += rejected

    return pack_shard(task, count)


@contextmanager
def dask(scheduler: str) -> Iterator[Executor]:
    """Use the workers of a Dask cluster; when one disappears, Dask gives its tasks to others.

    The workers need this package, and access to the input and output at the same paths or URLs. Raises
    PackingError if Dask is not installed, or if the scheduler or too many workers are lost.
    """
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise PackingError("--executor dask needs Dask: run pip install 'alexnet-train[dask]'") from None
    try:
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PackingError(f"--scheduler {scheduler} cannot be reached: {error}") from None
    with client:
        executor = client.get_executor(pure=False)
        try:
            yield Executor(
                lambda task: executor.submit(pack_shard, task), lambda: max(1, sum(client.ncores().values()))
            )
        except KilledWorker as error:
            raise PackingError(
                f"several Dask workers died while packing the same shard, perhaps for lack of memory "
                f"({error}); {_RESUMABLE}"
            ) from None
        except (CancelledError, OSError) as error:
            if isinstance(error, OSError) and client.status == "running":
                raise
            raise PackingError(
                f"the connection to the Dask scheduler at {scheduler} was lost; {_RESUMABLE}"
            ) from None
