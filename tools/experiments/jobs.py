"""Run the trainings of an experiment in several processes of this machine."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from pipeline.machine import cpus
from pipeline.packing.workers import WorkersError, pool
from tools.experiments.training import TrainingError

_function: Callable[..., Any]  # what a worker calls


def run_all(
    function: Callable[..., Any], shared: tuple[Any, ...], tasks: Iterable[tuple[Any, ...]], jobs: int
) -> list[Any]:
    """Return function(*shared, *task) for each task, with `jobs` tasks at a time, each in its own process.

    The processes share the CPUs evenly, and end with this one. With one job, this process does the work.
    Raises TrainingError if a process dies, and what the function raises.
    """
    if jobs == 1:
        return [function(*shared, *task) for task in tasks]
    threads = max(1, cpus() // jobs)
    try:
        with pool(jobs, _prepare, threads, function, *shared) as executor:
            return list(executor.map(_call, tasks))
    except WorkersError as error:
        raise TrainingError(str(error).replace("--workers", "--jobs")) from None


def _prepare(threads: int, function: Callable[..., Any], *shared: Any) -> None:
    global _function
    torch.set_num_threads(threads)
    _function = partial(function, *shared)


def _call(task: tuple[Any, ...]) -> Any:
    return _function(*task)
