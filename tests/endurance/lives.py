"""The lives of a run that chaos.py kills: their processes, and what the run's files say about them.

A life starts from a fork server that has imported everything training needs, which saves ten seconds of
imports. It is the real command in its own process, or in one process per rank, and is killed by a real
SIGKILL. It differs from the command in two ways: every image that the net gets is recorded, and the watchdog
uses its short limit during start-up, too. `CommandLife` is the unmodified command.
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

SILENCE_SECONDS = 30.0  # without progress until the watchdog ends a process

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["trainer.cli", "trainer.train", "trainer.monitor.report"])


class DifferenceError(Exception):
    """A difference from the run without kills; the message says what differs and where."""


class Life(Protocol):
    """A run's processes, from their start to the end of the last one."""

    world: int

    def is_over(self) -> bool: ...
    def kill(self, ranks: Sequence[int]) -> None: ...
    def join(self, seconds: float | None = None) -> list[int]:
        """Wait for the end; return exit codes, negative for a signal. Raises DifferenceError."""


def warm_up() -> None:
    """Let the fork server import what the lives need, so that the first one does not wait for it."""
    first = _forkserver.Process(target=free_port)
    first.start()
    first.join()


class ForkedLife:
    """A process for each rank, with the environment that torchrun would give it.

    images: files to record each rank's images in, see `recorded`. log: file for stdout and stderr.
    """

    def __init__(self, arguments: Sequence[str], world: int, images: Path, log: Path):
        self.world = world
        port = free_port()
        self.processes = [
            _forkserver.Process(
                target=_live,
                args=(
                    arguments,
                    {**os.environ, **_environment(rank, world, port)},
                    images.with_suffix(f".{rank}"),
                    log,
                ),
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
            raise DifferenceError(
                f"rank {hanging[0]} has not ended {seconds:.0f} s after another rank was killed"
            )
        return [process.exitcode or 0 for process in self.processes]


class CommandLife:
    """An unmodified command."""

    world = 1

    def __init__(self, command: Sequence[str], log: Path):
        # Otherwise torchrun keeps its store across a restart, and ranks use each other's old addresses.
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


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for a process; none for a single process."""
    if world == 1:
        return {}
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def _live(arguments: Sequence[str], environment: dict[str, str], images: Path, log: Path) -> None:
    """Run the command in the process of a rank."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)

    import torch

    from pipeline import training
    from trainer import cli
    from trainer.processes import watchdog

    torch.set_num_threads(1)  # as torchrun does for several processes
    watchdog.START_UP_SECONDS = SILENCE_SECONDS
    training.train_loader = recorded(training.train_loader, images)
    sys.argv = ["alexnet-train", *arguments]
    cli.main()


def recorded(loader: Callable[..., Iterator], path: Path) -> Callable[..., Iterator]:
    """Wrap the train loader to write a line for each batch that is taken from it.

    The line has the step, and for each image the BLAKE2b hash of its pixels and label. Lines survive a kill
    of the process.
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
    """Tells from the files of a run what it is doing, from the start of a life.

    batch, samples: images per step and per epoch. durable: the newest step with a checkpoint so far.
    """

    def __init__(self, run: Run, batch: int, samples: int):
        self.run, self.batch, self.samples = run, batch, samples
        self.durable = newest_step(run)
        self._before = "resume" if self.durable else "start-up"
        self._starts = len(run.starts())
        self._left_behind = self._unfinished()

    def moment(self) -> str:
        """Return one of MOMENTS."""
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
        """Return the temporary files of checkpoints, with their modification times."""
        return {(path.name, time) for path in unfinished(self.run.checkpoints) if (time := _changed(path))}


MOMENTS = ("start-up", "resume", "training", "checkpoint write", "evaluation")


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial"))


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # it has been renamed in the meantime
        return None


def newest_step(run: Run) -> int:
    """Return the newest checkpoint's step, by its name; 0 if there is none."""
    return max((int(path.stem.partition("-")[2]) for path in run.checkpoints.glob("*.pt")), default=0)


def last_step(table: Path) -> int:
    """Return the last step in a table; 0 if it has no rows."""
    lines = table.read_text().splitlines(keepends=True)[1:] if table.exists() else []
    return max((int(line.split(",")[0]) for line in lines if line.endswith("\n")), default=0)
