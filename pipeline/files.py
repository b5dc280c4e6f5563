"""Files that are whole or not there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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

    However little comes at a time; after EAGAIN, where Python's own would return what came until then, it is
    raised. Raises OSError, which names the file.
    """
    with naming(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        # One more than there is, so that the end shows itself.
        left = max(os.fstat(file.fileno()).st_size - offset, 0) + 1 if size is None else size
        parts = []
        while left or size is None:
            part = file.read(max(left, 1))
            if part is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if not part:
                break
            parts.append(part)
            left = max(left - len(part), 0)
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
        os.close(opened)
