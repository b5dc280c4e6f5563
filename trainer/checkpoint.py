"""Checkpoints on disk: written atomically, verified when loaded, with the newest few and the best kept.

step-000000500.pt   the state after that many steps
best-000000450.pt   the state with the lowest validation error so far; it is a second name (a hard link) of
                    a step file, and remains after that name has been deleted

A file holds what `torch.save` writes, followed by a line with the SHA-256 of everything before it, which
torch.load ignores. Loading a file never runs code that it may contain.

A checkpoint is deleted only after its replacement has been read back from the disk. None is deleted because
it cannot be read: a read error may be temporary, but a deletion is not.
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

_CHECKSUM_LINE = b"\nsha256 %s\n"
_CHECKSUM_LINE_BYTES = len(_CHECKSUM_LINE % (b"0" * 64))
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"(?P<kind>step|best)-\d+\.pt")


class DamagedError(ValueError):
    """A checkpoint whose content differs from what was written."""


def write(
    folder: Path, step: int, state: dict[str, Any], keep: int, best: bool = False
) -> tuple[int, list[str]]:
    """Write the state after `step` steps, then delete all checkpoints but the newest `keep` and the best.

    The file gets its name only once it is on the disk and has been read back. Returns its size in bytes and
    a message for each older file that could not be deleted, which does not invalidate the new checkpoint.
    Raises OSError if the checkpoint cannot be written; existing checkpoints then remain.
    """
    folder.mkdir(exist_ok=True)
    _delete(left for left in folder.iterdir() if left.suffix == ".partial")  # by a process that was killed
    path = path_of(folder, step)
    # The `best` name comes first: a run that resumes from this checkpoint will not save it again as the best.
    first = path.with_name(path.name.replace("step", "best")) if best else path
    with atomic_write(first) as file:
        _write_with_checksum(state, file)
        size = file.tell()
        _read_back(file)
    if best:
        _link_or_copy(first, path)
    try:
        superseded = _superseded(folder, step, keep, best)
    except OSError as error:
        return size, [f"{folder} cannot be listed to delete old checkpoints: {error.strerror}"]
    return size, _delete(superseded)


def _superseded(folder: Path, step: int, keep: int, best: bool) -> list[Path]:
    """Return the files that the checkpoint of that step replaces. Raises OSError."""
    paths = list_checkpoints(folder)
    older = [path for path in paths if _step(path) < step]
    bests = [path for path in older if best and path.name.startswith("best")]
    steps = [path for path in older if path.name.startswith("step")][keep - 1 :]
    # The run skipped any later checkpoint because it was damaged, or it would have resumed from it.
    return bests + steps + [path for path in paths if _step(path) > step and _is_damaged(path)]


def _is_damaged(path: Path) -> bool:
    """Return whether the file can be read in full but differs from what was written."""
    try:
        with open(path, "rb") as file:
            _verify(file)
    except DamagedError:
        return True
    except OSError:
        pass
    return False


def _delete(paths: Iterable[Path]) -> list[str]:
    """Delete files. Returns a message for each one that cannot be deleted."""
    left = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            left.append(f"{path} cannot be deleted: {error.strerror}")
    return left


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.pt"


def _write_with_checksum(state: dict[str, Any], file: BinaryIO) -> None:
    hashing = _HashingFile(file)
    try:
        torch.save(state, hashing)  # type: ignore[arg-type]  # all that torch.save uses is write and flush
    except RuntimeError as error:
        raise hashing.error or error from None  # torch does not report why a write failed
    file.write(_CHECKSUM_LINE % hashing.sha256.hexdigest().encode())
    file.flush()


class _HashingFile:
    """A file that keeps the SHA-256 of what was written to it, and the error of a write that failed."""

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
    """Check that the disk holds what was written. Raises OSError if it does not."""
    sync(file.fileno(), file.name)
    with suppress(OSError):  # not every file system supports it
        # Drop the file from the page cache: it is then read from the disk, and images can use the memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with open(file.name, "rb") as written:
            _verify(written)
    except DamagedError as error:
        raise OSError(errno.EIO, "reading it back gives other content than was written") from error


def _link_or_copy(path: Path, name: Path) -> None:
    """Give a checkpoint a second name, by a hard link if possible and otherwise by a copy."""
    link = name.with_name(f".{name.name}.link.partial")  # a name that atomic_write does not use
    try:
        link.hardlink_to(path)
        link.replace(name)
    except OSError:  # not every file system supports links
        _delete([link])
        with open(path, "rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy, _CHUNK_BYTES)
    sync_folder(path.parent)


def list_checkpoints(folder: Path, kind: str = "*") -> list[Path]:
    """List the checkpoints in a folder, newest first; an absent folder has none.

    kind: `step`, `best`, or `*` for both. Raises OSError if the folder cannot be listed.
    """
    try:
        paths = set(patiently(lambda: list(folder.iterdir()), say_on_stderr))  # may list a file twice
    except FileNotFoundError:
        return []
    named = {path: match for path in paths if (match := _NAME.fullmatch(path.name))}
    of_kind = [path for path, match in named.items() if kind in ("*", match["kind"])]
    return sorted(of_kind, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem[len("step-") :])


def load(folder: Path, device: torch.device, kind: str = "*") -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest good checkpoint. Returns its state and a message for each damaged one that was skipped.

    kind: `step`, `best`, or `*` for both. The state is None if there are no checkpoints. Raises RunError if
    all are damaged, or if one cannot be read, since it may be good, and OSError if the folder cannot be
    listed.
    """
    skipped: list[str] = []
    paths = list_checkpoints(folder, kind)
    for path in paths:
        try:
            return patiently(partial(_load_file, path, device), say_on_stderr), skipped
        except (DamagedError, pickle.UnpicklingError) as error:
            skipped.append(f"{path} is damaged: {str(error).partition('. ')[0]}")
        except OSError as error:
            if list_checkpoints(folder, kind) != paths:  # the run is still training, and has deleted it
                return load(folder, device, kind)
            raise RunError(
                f"{path} cannot be read: {error.strerror}. It may be intact: make it readable and run the "
                "same command again, or delete it to use the checkpoint before it"
            ) from error
    if skipped:
        raise RunError("; ".join(skipped) + ": no intact checkpoint is left; delete them to start over")
    return None, skipped


def _load_file(path: Path, device: torch.device) -> dict[str, Any]:
    """Load one file. Raises DamagedError, pickle.UnpicklingError or an OSError that names the file."""
    # Read the file only once: torch would report a failing read as damage.
    with io.BytesIO(read_file(path)) as file:
        _verify(file)
        return torch.load(file, map_location=device, weights_only=True)


def _verify(file: BinaryIO) -> None:
    """Compare a file with the checksum on its last line, and rewind it. Raises DamagedError."""
    left = file.seek(0, os.SEEK_END) - _CHECKSUM_LINE_BYTES
    file.seek(0)
    sha256 = hashlib.sha256()
    while left > 0 and (chunk := read_fully(file, min(_CHUNK_BYTES, left))):
        sha256.update(chunk)
        left -= len(chunk)
    if read_fully(file, _CHECKSUM_LINE_BYTES) != _CHECKSUM_LINE % sha256.hexdigest().encode():
        raise DamagedError("its content does not match its checksum")
    file.seek(0)
