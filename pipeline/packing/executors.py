"""Run packing tasks in processes on this machine, or on the workers of a Dask cluster."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.packing.shard import PackingError, ShardTask, pack_shard
from pipeline.packing.shard_results import ShardResult
from pipeline.packing.workers import WorkersError, pool, shared_array

_RESUMABLE = "finished shards are kept: run the same command again to continue"
_POLL_SECONDS = 0.2  # between checks for finished tasks


@dataclass
class Counts:
    """Numbers of images processed, JPEG bytes packed, and images rejected."""

    images: int = 0
    bytes: int = 0
    rejected: int = 0

    def add(self, result: ShardResult) -> None:
        """Add the counts of a finished shard."""
        self.images += len(result.rows) + result.rejected
        self.bytes += int(result.rows["size"].sum())
        self.rejected += result.rejected


@dataclass
class Executor:
    """Runs packing tasks.

    submit: starts `pack_shard` for a task. concurrency: returns the number of tasks that run at once. counts:
    returns the counts so far, including unfinished shards; None if this process cannot know those.
    """

    submit: Callable[[ShardTask], Future[ShardResult]]
    concurrency: Callable[[], int]
    counts: Callable[[], Counts] | None = None


def run_tasks(
    tasks: Sequence[ShardTask], executor: Executor, show: Callable[[Counts], None]
) -> list[ShardResult]:
    """Run the tasks and return their results in order; call `show` with the counts a few times a second.

    Raises the first error of a task, after which no further task starts.
    """
    results: dict[int, ShardResult] = {}  # by the index of the task
    running: dict[Future[ShardResult], int] = {}
    pending, finished = iter(enumerate(tasks)), Counts()
    try:
        while len(results) < len(tasks):
            # Tasks are large, because each lists its files: submit only enough to keep all workers busy.
            free = max(0, 2 * executor.concurrency() - len(running))
            for index, task in islice(pending, free):
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
    """Start worker processes on this machine. Raises PackingError if one cannot be started or dies."""
    try:
        shared = shared_array("q", 3)
        with pool(count, _set_shared_counts, shared) as workers:
            yield Executor(
                lambda task: workers.submit(_pack_and_count, task), lambda: count, lambda: Counts(*shared[:])
            )
    except WorkersError as error:
        raise PackingError(f"{error}; {_RESUMABLE}") from None


_shared_counts: Any = None  # in a worker process: an array with the fields of Counts over all workers


def _set_shared_counts(shared: Any) -> None:
    global _shared_counts
    _shared_counts = shared


def _pack_and_count(task: ShardTask) -> ShardResult:
    def count(size: int, rejected: int) -> None:
        with _shared_counts.get_lock():
            _shared_counts[0] += 1
            _shared_counts[1] += size
            _shared_counts[2] += rejected

    return pack_shard(task, count)


@contextmanager
def dask(scheduler: str) -> Iterator[Executor]:
    """Use the workers of a Dask cluster; when one disappears, Dask gives its tasks to others.

    scheduler: the address of the cluster's scheduler, which needs this package as the workers do. The workers
    also need access to the input and the output under the same paths or URLs. Raises PackingError if Dask is
    not installed, if the scheduler cannot be reached, lacks this package or is lost, or if several workers
    die while packing the same shard.
    """
    try:
        from distributed import Client
        from distributed.comm import resolve_address
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise PackingError("--executor dask needs Dask: run pip install 'alexnet-train[dask]'") from None
    try:
        resolve_address(scheduler)  # or the client would try to close for a minute
        client = Client(scheduler, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PackingError(f"--scheduler {scheduler} cannot be reached: {error}") from None
    lost = PackingError(f"the connection to the Dask scheduler at {scheduler} was lost; {_RESUMABLE}")
    has_waited = False

    def concurrency() -> int:
        nonlocal has_waited
        try:
            cores = sum(client.ncores().values())
        except OSError:  # may come before the client notices the loss and cancels its futures
            raise lost from None
        if not cores and not has_waited:
            has_waited = True
            print(f"waiting for a Dask worker: {scheduler} has none", file=sys.stderr, flush=True)
        return max(1, cores)

    with client:
        workers = client.get_executor(pure=False)
        try:
            yield Executor(lambda task: workers.submit(pack_shard, task), concurrency)
        except KilledWorker as error:
            raise PackingError(
                "several Dask workers died while packing the same shard: they may be out of memory, or may "
                f"lack this version of alexnet-train ({error}); {_RESUMABLE}"
            ) from None
        except CancelledError:
            raise lost from None
        except RuntimeError as error:
            if "deserialization of the task graph" not in str(error):
                raise
            raise PackingError(
                "the Dask scheduler and its workers need the version of alexnet-train that this command has: "
                "install it there"
            ) from None
