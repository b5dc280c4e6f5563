"""Write and load checkpoints: atomically, with checksums, and keeping the newest few and the best.

step-000000500.pt   the state after that many steps
best-000000450.pt   the state with the lowest validation error so far: a hard link to a step file, which keeps
                    the content when the step file is deleted

A file holds what `torch.save` writes, followed by a line with the SHA-256 of everything before it, which
`torch.load` ignores. Loading a file never runs code that it may contain.

A checkpoint is deleted only after its replacement has been read back from the disk. A checkpoint that cannot
be read is never deleted, because the read error may be temporary.
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
from pipeline.retry import with_retries
from trainer.run import RunError

_CHECKSUM_LINE = b"\nsha256 %s\n"
_CHECKSUM_LINE_BYTES = len(_CHECKSUM_LINE % (b"0" * 64))
_CHUNK_BYTES = 1 << 20
_NAME = re.compile(r"(?P<kind>step|best)-\d+\.pt")


class DamagedError(ValueError):
    """The content of a checkpoint differs from what was written."""


def write(
    folder: Path, step: int, state: dict[str, Any], keep: int, best: bool = False
) -> tuple[int, list[str]]:
    """Write the state after `step` steps, then delete all checkpoints but the newest `keep` and the best.

    best: whether this state has the lowest validation error so far. The file gets its name only once it is on
    the disk and has been read back. Returns its size in bytes, and a message for each older file that could
    not be deleted. Raises OSError if the checkpoint cannot be written; existing checkpoints then remain.
    """
    folder.mkdir(exist_ok=True)
    _delete(path for path in folder.iterdir() if path.suffix == ".partial")  # left by a killed process
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
    """Return the files that the checkpoint of a step replaces. Raises OSError if they cannot be listed."""
    paths = list_checkpoints(folder)
    older = [path for path in paths if _step(path) < step]
    bests = [path for path in older if best and path.name.startswith("best")]
    steps = [path for path in older if path.name.startswith("step")][keep - 1 :]
    # A damaged checkpoint of a later step was skipped when the run was continued from an earlier one.
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
    messages = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            messages.append(f"{path} cannot be deleted: {error.strerror}")
    return messages


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:09d}.pt"


def _write_with_checksum(state: dict[str, Any], file: BinaryIO) -> None:
    hashing = _HashingFile(file)
    try:
        torch.save(state, hashing)  # type: ignore[arg-type]  # torch.save uses only write and flush
    except RuntimeError as error:
        raise hashing.error or error from None  # torch does not report why a write failed
    file.write(_CHECKSUM_LINE % hashing.sha256.hexdigest().encode())
    file.flush()


class _HashingFile:
    """A writable file that computes the SHA-256 of its content, and keeps the error of a failed write."""

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
    """Read a written file back from the disk. Raises OSError if its content differs from what was written."""
    sync(file.fileno(), file.name)
    with suppress(OSError):  # not every file system supports it
        # Drop the file from the page cache, so that it is read from the disk and leaves its memory to images.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with open(file.name, "rb") as written:
            _verify(written)
    except DamagedError as error:
        raise OSError(errno.EIO, "the content that was read back differs from what was written") from error


def _link_or_copy(path: Path, name: Path) -> None:
    """Give a checkpoint a second name: by a hard link if possible, and otherwise by a copy."""
    link = name.with_name(f".{name.name}.link.partial")  # differs from the names that atomic_write uses
    try:
        link.hardlink_to(path)
        link.replace(name)
    except OSError:  # not every file system supports links
        _delete([link])
        with open(path, "rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy, _CHUNK_BYTES)
    sync_folder(path.parent)


def list_checkpoints(folder: Path, kind: str = "*") -> list[Path]:
    """Return the paths of the checkpoints in a folder, newest first, or none if there is no such folder.

    kind: `step`, `best`, or `*` for both. Raises OSError if the folder cannot be listed.
    """
    try:
        paths = set(with_retries(lambda: list(folder.iterdir())))  # a listing may name a file twice
    except FileNotFoundError:
        return []
    named = {path: match for path in paths if (match := _NAME.fullmatch(path.name))}
    of_kind = [path for path, match in named.items() if kind in ("*", match["kind"])]
    return sorted(of_kind, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem[len("step-") :])


def load(folder: Path, device: torch.device, kind: str = "*") -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest intact checkpoint. Returns its state, and a message for each damaged one skipped.

    kind: `step`, `best`, or `*` for both. The state is None if there are no checkpoints. Raises RunError if
    all are damaged, or if one cannot be read, since it may be intact, and OSError if the folder cannot be
    listed.
    """
    skipped: list[str] = []
    paths = list_checkpoints(folder, kind)
    for path in paths:
        try:
            return with_retries(partial(_load_file, path, device)), skipped
        except (DamagedError, pickle.UnpicklingError) as error:
            skipped.append(f"{path} is damaged: {str(error).partition('. ')[0]}")
        except OSError as error:
            if list_checkpoints(folder, kind) != paths:  # a run that is still training has deleted it
                return load(folder, device, kind)
            raise RunError(
                f"{path} cannot be read: {error.strerror}. It may be intact: make it readable and run the "
                "same command again, or delete it to use the checkpoint before it"
            ) from error
    if skipped:
        raise RunError("; ".join(skipped) + ": no intact checkpoint is left; delete them to start over")
    return None, skipped


def _load_file(path: Path, device: torch.device) -> dict[str, Any]:
    """Load one file. Raises DamagedError, pickle.UnpicklingError, or an OSError that names the file."""
    # Read the file first, because torch.load would report a failed read as damage.
    with io.BytesIO(read_file(path)) as file:
        _verify(file)
        return torch.load(file, map_location=device, weights_only=True)


def _verify(file: BinaryIO) -> None:
    """Compare a file's content with the checksum on its last line, and rewind it. Raises DamagedError."""
    remaining = file.seek(0, os.SEEK_END) - _CHECKSUM_LINE_BYTES
    file.seek(0)
    sha256 = hashlib.sha256()
    while remaining > 0 and (chunk := read_fully(file, min(_CHUNK_BYTES, remaining))):
        sha256.update(chunk)
        remaining -= len(chunk)
    if read_fully(file, _CHECKSUM_LINE_BYTES) != _CHECKSUM_LINE % sha256.hexdigest().encode():
        raise DamagedError("its content does not match its checksum")
    file.seek(0)
