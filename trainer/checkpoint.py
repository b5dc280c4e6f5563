"""Checkpoints on the disk: whole or not there, verified when loaded, the newest few and the best kept.

step-000000500.pt   the state after so many steps
best-000000450.pt   the one with the least validation error so far: another name of a file above,
                    which stays when that name is gone

A file is what `torch.save` writes and, on a line of its own that torch.load passes over, the SHA-256 of
all before it. It is loaded without running any code that it may contain.
"""

import errno
import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.files import sync_folder, whole_file
from trainer.run import RunError

_LAST_LINE = b"\nsha256 %s\n"
_LAST_LINE_BYTES = len(_LAST_LINE % (b"0" * 64))
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


def write(folder: Path, step: int, state: dict[str, Any], keep: int, best: bool = False) -> int:
    """Write the state after `step` steps, then delete all but the newest `keep` up to it, and the best.

    The file gets its name once it is on the disk and was read back. Returns its size in bytes. Raises
    OSError if it cannot be written; the checkpoints that were there stay.
    """
    folder.mkdir(exist_ok=True)
    for left_behind in folder.glob(".*.partial"):  # by a process that was killed
        left_behind.unlink()
    path = path_of(folder, step)
    # The best has that name first: once it can be loaded, a run that goes on from it will not save it again.
    first = path.with_name(path.name.replace("step", "best")) if best else path
    with whole_file(first) as file:
        _write_with_sum(state, file)
        _read_back(file)
    if best:
        _name_too(first, path)
        for old in saved(folder, "best"):
            if old != first:
                old.unlink()
    # Those after this step were damaged, or the run would have been continued from them.
    of_steps = saved(folder, "step")
    here = of_steps.index(path)
    for old in of_steps[:here] + of_steps[here + keep :]:
        old.unlink()
    return path.stat().st_size


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.pt"


def _write_with_sum(state: dict[str, Any], file: BinaryIO) -> None:
    summed = _Summed(file)
    try:
        torch.save(state, summed)  # type: ignore[arg-type]  # it writes and flushes, no more
    except RuntimeError as error:
        raise summed.error or error from None  # torch does not say why a write failed
    file.write(_LAST_LINE % summed.sha256.hexdigest().encode())
    file.flush()


class _Summed:
    """A file, with the SHA-256 of what was written to it and the error that ended it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _read_back(file: BinaryIO) -> None:
    """Raises OSError where the disk does not hold what was written."""
    os.fsync(file.fileno())
    # Out of the page cache, so that the disk is what is read; there images are of more use, too.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with open(file.name, "rb") as written:
            _verify(written)
    except DamagedError as error:
        raise OSError(errno.EIO, "it reads back other than it was written") from error


def _name_too(path: Path, name: Path) -> None:
    """Give a checkpoint a second name."""
    partial = name.with_name(f".{name.name}.partial")
    try:
        partial.hardlink_to(path)
        partial.replace(name)
    except OSError:  # not every file system has links
        with open(path, "rb") as source, whole_file(name) as copy:
            shutil.copyfileobj(source, copy, _CHUNK)
    sync_folder(path.parent)


def saved(folder: Path, kind: str = "*") -> list[Path]:
    """The checkpoints in a folder, the newest first. kind: `step` or `best`, or both."""
    return sorted(
        folder.glob(f"{kind}-*.pt"), key=lambda path: (path.stem[len("step-") :], path.stem), reverse=True
    )


def load(folder: Path, device: torch.device, kind: str = "*") -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest good checkpoint, and a line about each damaged one passed over.

    kind: `step` or `best`, or both. The state is None if there has never been one. Raises RunError if all
    are damaged.
    """
    passed_over: list[str] = []
    for path in saved(folder, kind):
        try:
            with open(path, "rb") as file:
                _verify(file)
                return torch.load(file, map_location=device, weights_only=True), passed_over
        except (DamagedError, pickle.UnpicklingError) as error:
            passed_over.append(f"{path} is damaged: {str(error).partition('. ')[0]}")
        except OSError as error:
            passed_over.append(f"{path} cannot be read: {error.strerror}")
    if passed_over:
        raise RunError("; ".join(passed_over) + ": no checkpoint is left to load; delete them to start anew")
    return None, passed_over


def _verify(file: BinaryIO) -> None:
    """Compare a file with the sum on its last line, and go back to its start. Raises DamagedError."""
    left = file.seek(0, os.SEEK_END) - _LAST_LINE_BYTES
    file.seek(0)
    sha256 = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        sha256.update(chunk)
        left -= len(chunk)
    if file.read() != _LAST_LINE % sha256.hexdigest().encode():
        raise DamagedError("its content is not what its last line says")
    file.seek(0)
