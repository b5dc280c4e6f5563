"""Checkpoints: written whole or not at all, verified when loaded, the newest few kept.

A checkpoint is a file of `torch.save`, which is a zip archive with a CRC-32 of each record; reading
all records checks them. It is loaded without running any code that it may contain.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from pipeline.files import whole_file
from trainer.run import RunError

_PATTERN = "step-{:09d}.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then delete all but the newest `keep`.

    The file gets its name once it is on the disk. Raises RunError if it cannot be written; what was
    there stays.
    """
    folder.mkdir(exist_ok=True)
    for left_behind in folder.glob(".*.partial"):  # by a process that was killed
        left_behind.unlink()
    path = folder / _PATTERN.format(step)
    try:
        with whole_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"  # torch does not say
        raise RunError(
            f"the checkpoint {path} cannot be written: {reason}. Mend it and give the same command again: "
            "the run continues from its last checkpoint"
        ) from error
    for old in saved(folder)[:-keep]:
        old.unlink()
    return path


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_newest(folder: Path, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest good checkpoint, and a line about each damaged one passed over.

    The state is None if there has never been one. Raises RunError if all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(saved(folder)):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is None:
                return torch.load(path, map_location=device, weights_only=True), damaged
            damaged.append(f"{path} is damaged in {bad}")
        except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
            damaged.append(f"{path} is damaged: {str(error).partition('. ')[0]}")
    if damaged:
        raise RunError(
            "; ".join(damaged) + ": no checkpoint is left to continue from; delete them to start anew"
        )
    return None, damaged
