"""Read, write and flush files: atomic writes, complete reads, and errors that name the file."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

# Errors from storage that does not support fsync, or not on folders or files opened for reading: SMB, DrvFs,
# vboxsf, some FUSE file systems. Write errors (EIO, ENOSPC, EDQUOT) and outages (ESTALE) are not among them.
_NO_SYNC = {
    errno.EINVAL,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.EROFS,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}
_CHUNK = 1 << 20  # bytes


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to each OSError of the block that lacks one, as those of read and write do."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_file(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file from `offset` on: all of it or `size` bytes, and fewer only if the file ends before.

    Raises OSError, which names the file.
    """
    with naming(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        if size is not None:
            return read_fully(file, size)
        size = max(os.fstat(file.fileno()).st_size - offset, 0)
        content = read_fully(file, size + 1)
        while len(content) > size:  # the file is growing, or its size was not known
            size = len(content)
            content += read_fully(file, _CHUNK)
        return content


def read_fully(file: BinaryIO | io.FileIO, size: int) -> bytes:
    """Read the next `size` bytes, however few arrive at a time, and fewer only at the end of the file.

    Raises OSError, also for EAGAIN, which Python's own `read` reports as the end of the file.
    """
    parts = []
    while size:
        part = file.read(size)
        if part is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: it gets its name, or replaces the file of that name, once it is on the disk.

    After an error in the block, or a failed write (OSError), nothing of it is left, and any file that had the
    name before is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            sync(file.fileno(), path)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync(file: int, path: str | Path) -> None:
    """Flush a file or folder to the disk, where its storage supports that, and so make it survive a crash.

    file: an open descriptor. Raises OSError, which names the path, if the storage fails.
    """
    try:
        with naming(path):
            os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where its storage supports that. Raises OSError."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return
    try:
        sync(opened, folder)
    finally:
        close_quietly(opened)


def close_quietly(file: int | IO) -> None:
    """Close a file or descriptor that has no written data to lose, and ignore errors.

    On a mount that went away, closing fails, and that error would hide the one that ended the work.
    """
    with suppress(OSError):
        os.close(file) if isinstance(file, int) else file.close()


@contextmanager
def held_open(lock: IO) -> Iterator[None]:
    """Keep a lock file open during the block, then close it and ignore errors."""
    try:
        yield
    finally:
        close_quietly(lock)
