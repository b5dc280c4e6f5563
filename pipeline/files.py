"""Files that are whole or not there."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

# What storage answers that does not know fsync, or not of a folder or of a file opened for reading: SMB,
# DrvFs, vboxsf, some FUSE. Errors in writing (EIO, ENOSPC, EDQUOT) and outages (ESTALE) are none of these.
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
    """Give each OSError in the block the file's name if it has none, as those of read and write have not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def read_file(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on, fewer only where it ends before.

    Raises OSError, which names the file.
    """
    with naming(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        if size is not None:
            return read_fully(file, size)
        size = max(os.fstat(file.fileno()).st_size - offset, 0)
        content = read_fully(file, size + 1)
        while len(content) > size:  # it grows, or its size was not known
            size = len(content)
            content += read_fully(file, _CHUNK)
        return content


def read_fully(file: BinaryIO | io.FileIO, size: int) -> bytes:
    """The next `size` bytes, however little comes at a time, and fewer only at the end of the file.

    Raises OSError, also for EAGAIN, which Python's own `read` takes for the end.
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
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes its name, or another's place, once it is whole and on the disk.

    After an error in the block, or a failed write (OSError), nothing of it is left and what bore the
    name before is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            sync(file.fileno(), path)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell of
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync(file: int, path: str | Path) -> None:
    """Make what was written to a file or folder last through a crash, where its storage can.

    file: an open descriptor. Raises OSError, which names the path, where the storage failed to.
    """
    try:
        with naming(path):
            os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a crash, where its storage can. Raises OSError."""
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
    """Close a file or descriptor to which nothing was written that matters.

    A mount that went away answers with an error, which would hide the one that ended the work.
    """
    with suppress(OSError):
        os.close(file) if isinstance(file, int) else file.close()


@contextmanager
def held_open(lock: IO) -> Iterator[None]:
    """Keep a lock file open for the block, and close it quietly."""
    try:
        yield
    finally:
        close_quietly(lock)
