"""Checks of killed runs: a kill loses nothing that was saved, and the final result is unaffected."""

import csv
import fcntl
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.endurance.lives import DifferenceError, unfinished
from trainer import checkpoint
from trainer.run import Run

EXACT = ("step", "epoch", "loss", "error", "learning_rate")  # columns of metrics.csv; the others are times
CPU = torch.device("cpu")

Images = dict[int, dict[int, str]]  # step → position in the batch → hash of the image


def read_images(records: Path, batch: int) -> tuple[Images, int]:
    """Return the images that the net got in each step, and the number of steps begun in all lives together.

    records: files `<life>-<world>.<rank>`. Raises DifferenceError if two lives got different images.
    """
    images: Images = defaultdict(dict)
    begun = 0
    for path in sorted(records.iterdir()):
        world, rank = int(path.stem.split("-")[1]), int(path.suffix[1:])
        first = rank * batch // world  # a rank's images are contiguous, in the order of ranks
        for line in path.read_text().splitlines():
            step, *sums = line.split()
            begun += rank == 0
            for index, image in enumerate(sums, first):
                if images[int(step)].setdefault(index, image) != image:
                    raise DifferenceError(
                        f"{path}: image {index} of step {step} differs from an earlier life"
                    )
    return images, begun


def begun_steps(records: Path, life: str) -> tuple[int, int]:
    """Return a life's first step on rank 0, and the step after its last; (0, 0) if it did none."""
    path = records / f"{life}.0"
    steps = [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []
    return (steps[0], steps[-1] + 1) if steps else (0, 0)


def check_images(images: Images, reference: Images) -> None:
    """Raise DifferenceError if a step's images or their order differ from the reference's."""
    for step, expected in reference.items():
        got = images.get(step, {})
        for index, image in expected.items():
            if got.get(index) != image:
                raise DifferenceError(
                    f"image {index} of step {step} is {got.get(index)}, without kills {image}"
                )


def check_saved(run: Run, durable: int) -> int:
    """Return the step of the newest checkpoint, after all processes of a life have ended.

    durable: the newest step ever saved. Raises DifferenceError if anything saved is lost or damaged, or if
    files or the lock were left behind.
    """
    state, damaged = checkpoint.load(run.checkpoints, CPU)
    if damaged:
        raise DifferenceError(f"after a kill, {damaged[0]}")
    step = state["step"] if state else 0
    if step < durable:
        raise DifferenceError(
            f"after a kill the newest checkpoint is of step {step}, but there was one of step {durable}"
        )
    rows = [int(row["step"]) for row in read(run.metrics.path) if int(row["step"]) <= step]
    if rows != list(range(1, step + 1)):
        raise DifferenceError(f"after a kill, {run.metrics.path} lacks rows up to the saved step {step}")
    evaluations = len([row for row in read(run.evaluations.path) if int(row["step"]) <= step])
    if state and evaluations < len(state["errors"]):
        raise DifferenceError(f"after a kill, {run.evaluations.path} lacks rows up to the saved step {step}")
    if state and state["errors"] and not checkpoint.list_checkpoints(run.checkpoints, "best"):
        raise DifferenceError(f"after a kill at step {step} there is no best checkpoint")
    if len(left := unfinished(run.checkpoints)) > 1:
        raise DifferenceError(f"{len(left)} temporary files are left in {run.checkpoints}")
    if (run.folder / ".lock").exists():
        with open(run.folder / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DifferenceError(f"{run.folder} is locked, but none of its processes is left") from None
    return step


def check_end(run: Run, reference: Run, same_world: bool) -> float:
    """Compare a finished run with one that was not killed.

    They must be equal bit for bit if the numbers of processes were the same. Returns the largest relative
    difference between two losses. Raises DifferenceError.
    """
    rows, expected = read(run.metrics.path), read(reference.metrics.path)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        raise DifferenceError(f"{run.metrics.path} has other steps than without kills")
    largest = 0.0
    for row, other in zip(rows, expected, strict=True):
        for column in EXACT if same_world else ():
            if row[column] != other[column]:
                raise DifferenceError(
                    f"{column} of step {row['step']} is {row[column]}, without kills {other[column]}"
                )
        a, b = float(row["loss"]), float(other["loss"])
        largest = max(largest, abs(a - b) / abs(b))
    if same_world:
        if read(run.evaluations.path) != read(reference.evaluations.path):
            raise DifferenceError(f"{run.evaluations.path} is not that of the run without kills")
        for kind in ("step", "best"):
            state, expected_state = (checkpoint.load(of.checkpoints, CPU, kind)[0] for of in (run, reference))
            check_same(state, expected_state, f"the {kind} checkpoint at the end")
    if left := sorted(run.folder.rglob(".*.partial")):
        raise DifferenceError(f"the temporary file {left[0]} is still there at the end")
    return largest


def check_same(value: Any, expected: Any, name: str) -> None:
    """Compare two states bit for bit, except for the time. Raises DifferenceError."""
    if isinstance(expected, dict):
        if value.keys() != expected.keys():
            raise DifferenceError(f"{name} has other entries than without kills")
        for key in expected.keys() - {"time"}:
            check_same(value[key], expected[key], f"{name}, {key}")
    elif isinstance(expected, Tensor):
        if value.numpy().tobytes() != expected.numpy().tobytes():
            largest = (value - expected).abs().max()
            raise DifferenceError(f"{name} differs from that without kills by up to {largest:.3g}")
    elif isinstance(expected, list):
        for number, (item, other) in enumerate(zip(value, expected, strict=True)):
            check_same(item, other, f"{name}, {number}")
    elif value != expected:
        raise DifferenceError(f"{name} is {value}, without kills {expected}")


def read(table: Path) -> list[dict[str, str]]:
    """Return the complete rows of a table, as text."""
    if not table.exists():
        return []
    lines = [line for line in table.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return list(csv.DictReader(lines))
