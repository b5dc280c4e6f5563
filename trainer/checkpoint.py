"""Checkpoints on the disk: whole or not there, verified when loaded, the newest few and the best kept.

step-000000500.pt   the state after so many steps
best-000000450.pt   the one with the least validation error so far: another name of a file above,
                    which stays when that name is gone

A file is what `torch.save` writes and, on a line of its own that torch.load passes over, the SHA-256 of
all before it. It is loaded without running any code that it may contain.

One is deleted only after another that takes its place was read back from the disk, and none because it could
not be read: that may pass, and what was deleted is gone.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.files import atomic_write, read_file, read_fully, sync, sync_folder
from pipeline.retry import patiently, say_on_stderr
from trainer.run import RunError

_LAST_LINE = b"\nsha256 %s\n"
_LAST_LINE_BYTES = len(_LAST_LINE % (b"0" * 64))
_CHUNK = 1 << 20
_NAME = re.compile(r"(?P<kind>step|best)-\d+\.pt")


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


def write(
    folder: Path, step: int, state: dict[str, Any], keep: int, best: bool = False
) -> tuple[int, list[str]]:
    """Write the state after `step` steps, then delete all but the newest `keep` up to it, and the best.

    The file gets its name once it is on the disk and was read back. Returns its size in bytes, and a line
    about each older file that could not be deleted: the checkpoint is there all the same. Raises OSError if
    it cannot be written; the checkpoints that were there stay.
    """
    folder.mkdir(exist_ok=True)
    _delete(left for left in folder.iterdir() if left.suffix == ".partial")  # by a process that was killed
    path = path_of(folder, step)
    # The best has that name first: once it can be loaded, a run that goes on from it will not save it again.
    first = path.with_name(path.name.replace("step", "best")) if best else path
    with atomic_write(first) as file:
        _write_with_sum(state, file)
        size = file.tell()
        _read_back(file)
    if best:
        _name_too(first, path)
    try:
        superseded = _superseded(folder, step, keep, best)
    except OSError as error:
        return size, [f"{folder} cannot be listed, to delete old checkpoints: {error.strerror}"]
    return size, _delete(superseded)


def _superseded(folder: Path, step: int, keep: int, best: bool) -> list[Path]:
    """The files in whose place the checkpoint of that step is. Raises OSError."""
    paths = saved(folder)
    older = [path for path in paths if _step(path) < step]
    bests = [path for path in older if best and path.name.startswith("best")]
    steps = [path for path in older if path.name.startswith("step")][keep - 1 :]
    # The run passed over those after this step, or it would have gone on from them.
    return bests + steps + [path for path in paths if _step(path) > step and _is_damaged(path)]


def _is_damaged(path: Path) -> bool:
    """Whether all of it can be read, and is not what was written."""
    try:
        with open(path, "rb") as file:
            _verify(file)
    except DamagedError:
        return True
    except OSError:
        pass
    return False


def _delete(paths: Iterable[Path]) -> list[str]:
    """Returns a line about each that cannot be deleted."""
    left = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            left.append(f"{path} cannot be deleted: {error.strerror}")
    return left


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
    sync(file.fileno(), file.name)
    with suppress(OSError):  # where it is not known
        # Out of the page cache, so that the disk is what is read; there images are of more use, too.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with open(file.name, "rb") as written:
            _verify(written)
    except DamagedError as error:
        raise OSError(errno.EIO, "it reads back other than it was written") from error


def _name_too(path: Path, name: Path) -> None:
    """Give a checkpoint a second name."""
    link = name.with_name(f".{name.name}.link.partial")  # no name that atomic_write would write into
    try:
        link.hardlink_to(path)
        link.replace(name)
    except OSError:  # not every file system has links
        _delete([link])
        with open(path, "rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy, _CHUNK)
    sync_folder(path.parent)


def saved(folder: Path, kind: str = "*") -> list[Path]:
    """The checkpoints in a folder, the newest first; none where there is no such folder. kind: `step` or
    `best`, or both. Raises OSError if it cannot be listed."""
    try:
        paths = set(patiently(lambda: list(folder.iterdir()), say_on_stderr))  # some storage names one twice
    except FileNotFoundError:
        return []
    named = {path: match for path in paths if (match := _NAME.fullmatch(path.name))}
    of_kind = [path for path, match in named.items() if kind in ("*", match["kind"])]
    return sorted(of_kind, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem[len("step-") :])


def load(folder: Path, device: torch.device, kind: str = "*") -> tuple[dict[str, Any] | None, list[str]]:
    """The state of the newest good checkpoint, and a line about each damaged one passed over.

    kind: `step` or `best`, or both. The state is None if there has never been one. Raises RunError if all
    are damaged, or one cannot be read, which may be good; and OSError if the folder cannot be listed.
    """
    passed_over: list[str] = []
    paths = saved(folder, kind)
    for path in paths:
        try:
            return patiently(partial(_loaded, path, device), say_on_stderr), passed_over
        except (DamagedError, pickle.UnpicklingError) as error:
            passed_over.append(f"{path} is damaged: {str(error).partition('. ')[0]}")
        except OSError as error:
            if saved(folder, kind) != paths:  # the run goes on meanwhile, and has deleted it
                return load(folder, device, kind)
            raise RunError(
                f"{path} cannot be read: {error.strerror}. It may be good: make it readable and give the "
                "same command again, or delete it, and the one before is taken"
            ) from error
    if passed_over:
        raise RunError("; ".join(passed_over) + ": no checkpoint is left to load; delete them to start anew")
    return None, passed_over


def _loaded(path: Path, device: torch.device) -> dict[str, Any]:
    """Raises DamagedError, pickle.UnpicklingError or an OSError that names the file."""
    # Read once: torch would take a read that fails now for damage.
    with io.BytesIO(read_file(path)) as file:
        _verify(file)
        return torch.load(file, map_location=device, weights_only=True)


def _verify(file: BinaryIO) -> None:
    """Compare a file with the sum on its last line, and go back to its start. Raises DamagedError."""
    left = file.seek(0, os.SEEK_END) - _LAST_LINE_BYTES
    file.seek(0)
    sha256 = hashlib.sha256()
    while left > 0 and (chunk := read_fully(file, min(_CHUNK, left))):
        sha256.update(chunk)
        left -= len(chunk)
    if read_fully(file, _LAST_LINE_BYTES) != _LAST_LINE % sha256.hexdigest().encode():
        raise DamagedError("its content is not what its last line says")
    file.seek(0)
