"""Distinguish outages of the storage or the process from errors of a single file, and retry outages.

While a mount is away, a server restarts or the process has no free descriptor, one file after another fails.
If these counted as damaged, intact files would be left out because of a temporary problem.
"""

import errno
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.files import read_file

T = TypeVar("T")

PAUSES = (0.1, 0.4, 1.6, 5.0)  # seconds before each retry
_EIO_PAUSES = PAUSES[:2]  # a bad sector stays bad, and the disk has already retried
_LONGEST_WAIT = 30.0  # seconds, however long a server asks to wait

# Error numbers that concern a single file. All others count as an outage: ESTALE, ENOTCONN, EMFILE, ENOMEM,
# ETIMEDOUT and any that are unknown.
_FILE_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EILSEQ,  # its name is not valid in the file system
    errno.EFBIG,
    errno.EOVERFLOW,
    errno.ENXIO,  # it is a socket or a pipe
    errno.ENODEV,
    errno.EBADMSG,  # its checksum is wrong
    errno.EUCLEAN,  # its metadata in the file system is damaged
    errno.ENODATA,
    errno.EIO,
}
# fsspec raises these without an errno.
_FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class StorageError(OSError):
    """A file behind a URL cannot be reached; the message names it and says why.

    reason: why, in a few words. transient: whether the same request may succeed later. retries: how often to
    repeat the request. retry_after: how long the server asks to wait, in seconds, or 0.
    """

    def __init__(
        self,
        message: str,
        reason: str = "unreadable",
        transient: bool = True,
        retries: int = 0,
        retry_after: float = 0.0,
    ):
        super().__init__(message)
        self.reason, self.transient, self.retries, self.retry_after = reason, transient, retries, retry_after


def is_outage(error: OSError) -> bool:
    """Return whether an error concerns the storage or the process, and not only the requested file."""
    if isinstance(error, StorageError):
        return error.transient
    return not isinstance(error, _FILE_ERRORS) and error.errno not in _FILE_ERRNOS


def is_of_storage(error: Exception) -> bool:
    """Return whether an error came from the storage, and not from a library that reads what a file holds."""
    if isinstance(error, (StorageError, FileNotFoundError)):
        return True
    return isinstance(error, OSError) and error.errno is not None


def _print_to_stderr(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def with_retries(action: Callable[[], T], warn: Callable[[str], None] = _print_to_stderr) -> T:
    """Run the action and return its result; in an outage, retry with growing pauses for seven seconds.

    EIO, which may be either an outage or an error of the file, is retried for half a second. warn: called
    with a message before the first pause. Raises the last OSError.
    """
    attempt = 0
    while True:
        try:
            return action()
        except OSError as error:
            pauses = _pauses(error)
            if attempt >= len(pauses):
                raise
            if attempt == 0:
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
                warn(f"{what}: retrying for {sum(pauses):.1f} seconds")
            wait = error.retry_after if isinstance(error, StorageError) else 0.0
            time.sleep(max(pauses[attempt], min(wait, _LONGEST_WAIT)))
            attempt += 1


def read_with_retries(path: Path, size: int | None = None) -> bytes:
    """Read a file, or its first `size` bytes, and retry outages. Raises OSError, which names the file."""
    return with_retries(partial(read_file, path, size=size))


def _pauses(error: OSError) -> tuple[float, ...]:
    if isinstance(error, StorageError):
        return PAUSES[: error.retries]
    if error.errno == errno.EIO:
        return _EIO_PAUSES
    return PAUSES if error.errno is not None and is_outage(error) else ()
