"""The lives of a run that chaos.py kills: their processes, and what the run's files say of them.

A life comes from a fork server that has imported all that training needs. It is the command with its
arguments in a process of its own, or in one for each rank, and a SIGKILL is a real one; only the ten
seconds of imports are saved. Two things differ from the command: each image is recorded as the net gets
it, and the watchdog is impatient in start-up, too.
`CommandLife` is the command as it is.
"""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.run import Run

SILENCE_SECONDS = 30.0  # without progress, after which the watchdog ends a process

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["trainer.cli", "trainer.train", "trainer.monitor.report"])


class DifferenceError(Exception):
    """What is not as it would have been without kills; the message says what and where."""


class Life(Protocol):
    """From the start of a run's processes to the end of the last."""

    world: int

    def is_over(self) -> bool: ...
    def kill(self, ranks: Sequence[int]) -> None: ...
    def join(self, seconds: float | None = None) -> list[int]:
        """Wait for the end; the exit codes, minus the signal where one ended it. Raises DifferenceError."""


def warm_up() -> None:
    """Have the fork server import what the lives need, which the first one would wait for."""
    first = _forkserver.Process(target=_free_port)
    first.start()
    first.join()


class ForkedLife:
    """A process for each rank, with the environment that torchrun would give it.

    images: where each rank records what it trains on, see `recorded`. log: takes stdout and stderr.
    """

    def __init__(self, arguments: Sequence[str], world: int, images: Path, log: Path):
        self.world = world
        port = _free_port()
        self.processes = [
            _forkserver.Process(
                target=_live,
                args=(arguments, _environment(rank, world, port), images.with_suffix(f".{rank}"), log),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def join(self, seconds: float | None = None) -> list[int]:
        end = None if seconds is None else time.monotonic() + seconds
        for process in self.processes:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if hanging:
            self.kill(hanging)
            raise DifferenceError(f"rank {hanging[0]} hangs {seconds:.0f} s after another was killed")
        return [process.exitcode or 0 for process in self.processes]


class CommandLife:
    """A command, as it is typed."""

    world = 1

    def __init__(self, command: Sequence[str], log: Path):
        # Or torchrun keeps its store through a restart, and ranks take each other's addresses of before.
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=file, stderr=file
            )

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def kill(self, ranks: Sequence[int]) -> None:
        self.process.kill()

    def join(self, seconds: float | None = None) -> list[int]:
        return [self.process.wait(seconds)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of its world; nothing where the command starts alone."""
    if world == 1:
        return {}
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _live(arguments: Sequence[str], environment: dict[str, str], images: Path, log: Path) -> None:
    """In the process of a rank."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)

    import torch

    from trainer import cli, train
    from trainer.processes import watchdog

    torch.set_num_threads(1)  # as torchrun has it for several
    watchdog.START_SECONDS = SILENCE_SECONDS
    train.train_loader = recorded(train.train_loader, images)
    sys.argv = ["alexnet-train", *arguments]
    cli.main()


def recorded(loader: Callable[..., Iterator], path: Path) -> Callable[..., Iterator]:
    """The train loader, which writes a line for each batch that is taken from it.

    It has the number of the step, and for each image the BLAKE2b of its pixels and label. What a killed
    process had written stays.
    """

    def loading(dataset: object, plan: object, steps: range, *rest: Any, **options: Any) -> Iterator:
        batches = loader(dataset, plan, steps, *rest, **options)
        with open(path, "ab", buffering=0) as file:
            for step, (pixels, labels) in zip(steps, batches, strict=False):
                sums = []
                for image, label in zip(pixels, labels.tolist(), strict=True):
                    content = image.numpy().tobytes() + str(label).encode()
                    sums.append(hashlib.blake2b(content, digest_size=8).hexdigest())
                file.write(f"{step} {' '.join(sums)}\n".encode())
                yield pixels, labels

    return loading


class Watch:
    """What the files of a run say that it is doing, from the start of a life.

    batch and samples: of a step and of an epoch. durable: the newest step that a checkpoint was seen of.
    """

    def __init__(self, run: Run, batch: int, samples: int):
        self.run, self.batch, self.samples = run, batch, samples
        self.durable = newest_step(run)
        self._before = "resume" if self.durable else "start-up"
        self._starts = len(run.starts())
        self._left_behind = self._unfinished()

    def moment(self) -> str:
        """One of MOMENTS."""
        self.durable = max(self.durable, newest_step(self.run))
        if self._unfinished() - self._left_behind:
            return "checkpoint write"
        if len(self.run.starts()) == self._starts:
            return self._before
        trained, evaluated = last_step(self.run.metrics.path), last_step(self.run.evaluations.path)
        if trained * self.batch // self.samples > evaluated * self.batch // self.samples:
            return "evaluation"
        return "training"

    def _unfinished(self) -> set[tuple[str, int]]:
        """Temporary files of checkpoints, with the time of their last change."""
        return {(path.name, time) for path in unfinished(self.run.checkpoints) if (time := _changed(path))}


MOMENTS = ("start-up", "resume", "training", "checkpoint write", "evaluation")


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial"))


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # it has got its name meanwhile
        return None


def newest_step(run: Run) -> int:
    """Of the checkpoints, by their names; 0 if there is none."""
    return max((int(path.stem.partition("-")[2]) for path in run.checkpoints.glob("*.pt")), default=0)


def last_step(table: Path) -> int:
    """Of the rows in a table; 0 if there is none."""
    lines = table.read_text().splitlines(keepends=True)[1:] if table.exists() else []
    return max((int(line.split(",")[0]) for line in lines if line.endswith("\n")), default=0)
