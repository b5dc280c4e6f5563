"""Read files completely, write them atomically, flush them to the disk, and name them in errors."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

# Errors from storage that does not support fsync at all, or not on folders or files opened for reading: SMB,
# DrvFs, vboxsf and some FUSE file systems. Write errors (EIO, ENOSPC, EDQUOT) and outages (ESTALE) are not
# among them.
_SYNC_UNSUPPORTED = {
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
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Add the path to any OSError of the block that names no file, such as those of read and write."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_file(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file from the byte `offset` to its end, or `size` bytes of it, or fewer if it ends earlier.

    Raises OSError, which names the file.
    """
    with path_in_errors(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        if size is not None:
            return read_fully(file, size)
        size = max(os.fstat(file.fileno()).st_size - offset, 0)
        content = read_fully(file, size + 1)
        while len(content) > size:  # the file is growing, or its size was not known
            size = len(content)
            content += read_fully(file, _CHUNK)
        return content


def read_fully(file: BinaryIO | io.RawIOBase, size: int) -> bytes:
    """Read the next `size` bytes of an unbuffered file, or fewer only if it ends earlier.

    Raises OSError, also for EAGAIN, for which Python's own `read` raises nothing.
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
    """Write a file atomically: it appears under `path`, or replaces the file there, once it is on the disk.

    After an error in the block, or a failed write (OSError), nothing of the new file is left, and a previous
    file is unchanged.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path_in_errors(path), open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            sync(file.fileno(), path)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()
        if isinstance(error, OSError) and error.filename == str(partial):
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def sync(file: int, path: str | Path) -> None:
    """Flush a file or folder to the disk, if its storage supports that, so that it survives a crash.

    file: an open descriptor. Raises OSError, which names the path, if the storage fails.
    """
    try:
        with path_in_errors(path):
            os.fsync(file)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Flush the list of a folder's files to the disk, if its storage supports that. Raises OSError."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise
        return
    try:
        sync(opened, folder)
    finally:
        close_quietly(opened)


def close_quietly(file: int | IO) -> None:
    """Close a file or descriptor that has no unwritten data, and ignore errors.

    On a mount that has gone away, closing fails, and its error would hide the one that ended the work.
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
