"""Helpers that several test modules share: waiting with a deadline, processes, the trainer, and batches."""

import csv
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
from PIL import Image

from pipeline.loader import Batch, train_loader
from pipeline.manifest import DatasetError
from trainer import cli

REPO = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 180.0  # far more than any wait takes unless the machine is overloaded

# On the `packed` fixture's 60 training images, this gives 5 steps per epoch, a row in metrics.csv for each
# step, and checkpoints of 2 MB. The device and the precision are fixed, because numbers are compared bit for
# bit, whatever hardware `auto` would find.
TINY = ["--recipe", "demo", "--crop", "67", "--width", "0.125", "--batch", "12", "--epochs", "3"]
TINY += ["--log-every", "1", "--device", "cpu", "--precision", "fp32"]
EXACT = ("step", "epoch", "loss", "error", "learning_rate")

# Run alexnet-train and send it a signal when it requests a batch after a given number of steps.
SIGNALLED = """
import os, signal, sys
from pipeline import training
from trainer import cli

number, steps = signal.Signals[sys.argv.pop(1)], int(sys.argv.pop(1))
load = training.train_loader

def loader(dataset, plan, numbers, *rest, **options):
    for step, batch in zip(numbers, load(dataset, plan, numbers, *rest, **options)):
        if step == steps:
            os.kill(os.getpid(), number)
        yield batch

training.train_loader = loader
cli.main()
"""


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    *,
    pause: float = 0.01,
    seconds: float = DEADLINE_SECONDS,
) -> None:
    """Poll until the condition holds. Fails after `seconds`, or once `process` has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(pause)


def missing(what: str, command: str) -> NoReturn:
    """Skip the test because something that the command installs is missing; in CI, fail instead."""
    give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    give_up(f"{what} is missing: install it by `{command}`")


def project_copy(folder: Path) -> Path:
    """Copy the files that are, or could be, under version control to a new folder, and return it."""
    if not (REPO / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    return folder


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of this machine that nothing listens on.

    They lie below those that the kernel gives to other programs. `secrets` is not seeded by the test runner.
    """
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = 20_000 + secrets.randbelow(12_000)
            with suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def command(data: Path | str, out: Path, *arguments: str) -> list[str]:
    """Return the arguments of `python` that train a tiny run; `arguments` are more settings."""
    return ["-m", "trainer.cli", "--data", str(data), "--out", str(out), "--port", "0", *TINY, *arguments]


def run(*arguments: str) -> str:
    """Run `python` with these arguments, which must succeed, and return its output.

    If it hangs, the failure shows the stacks of all its processes.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, error = process.communicate(timeout=2 * DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        parent = psutil.Process(process.pid)
        for each in [*parent.children(recursive=True), parent]:
            with suppress(psutil.Error):  # it has ended
                each.send_signal(signal.SIGABRT)  # faulthandler then prints the stacks
        output, error = process.communicate()
        pytest.fail(f"not done after {2 * DEADLINE_SECONDS:.0f} s\n{output}\n{error}")
    assert process.returncode == 0, error
    return output


def signalled(name: str, steps: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the arguments of `command`, and send the process a signal when it requests the batch of a step."""
    script = [sys.executable, "-c", SIGNALLED, name, str(steps), *arguments[2:]]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def main(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """Do in this process what `python` would do with the arguments of `command`; return the exit code."""
    monkeypatch.setattr(sys, "argv", arguments[1:])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def main_without_more_images(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """Do as `main` does, but have the training loader fail after seven batches."""

    def broken(*arguments: Any, **options: Any) -> Iterator[Batch]:
        yield from islice(train_loader(*arguments, **options), 7)
        raise DatasetError("too many samples cannot be decoded")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.train_loader", broken)
        return main(patch, arguments)


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or none if it does not exist yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def exact(path: Path) -> list[tuple[str, ...]]:
    """Return the columns that must be equal bit for bit, as the text that was written."""
    return [tuple(row[name] for name in EXACT) for row in rows(path)]


def wait_for_rows(count: int, out: Path, process: subprocess.Popen) -> None:
    """Wait until a run has logged `count` steps."""
    wait_until(lambda: len(rows(out / "metrics.csv")) >= count, process)


def ranks_of(launcher: int) -> dict[str, int]:
    """Return the process IDs of the trainers that a launcher has started, by rank."""
    found = {}
    for child in psutil.Process(launcher).children():
        with suppress(psutil.Error):  # it has ended
            if rank := child.environ().get("RANK"):
                found[rank] = child.pid
    return found


def copies(loader: Iterable[Batch]) -> list[Batch]:
    """Return all batches of a loader, copied before the loader reuses their memory."""
    return [(pixels.clone(), labels.clone()) for pixels, labels in loader]


def assert_same_batches(batches: list[Batch], expected: list[Batch]) -> None:
    """Check that pixels and labels are equal bit for bit."""
    for batch, expected_batch in zip(batches, expected, strict=True):
        assert all(map(torch.equal, batch, expected_batch))


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its parent has not asked for its exit code."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def with_nearest_chroma(jpeg: bytes | memoryview) -> bytes:
    """Convert a 4:2:0 JPEG to a 4:4:4 JPEG in which each block of 2×2 pixels has the chroma stored for it.

    nvJPEG decodes in this way, while libjpeg interpolates the chroma.
    """
    whole, half = (Image.open(BytesIO(jpeg)) for _ in range(2))
    whole.draft("YCbCr", whole.size)
    half.draft("YCbCr", (whole.width // 2, whole.height // 2))  # at which chroma is left as it is stored
    chroma = (plane.resize(whole.size, Image.Resampling.NEAREST) for plane in half.split()[1:])
    file = BytesIO()
    Image.merge("YCbCr", [whole.split()[0], *chroma]).save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()
