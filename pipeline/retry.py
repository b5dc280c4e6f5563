"""Tell an outage of the storage or the process from an error of one file, and retry during an outage.

While a mount is away, a server restarts or the process has no free descriptor, one file after another fails.
If these counted as bad files, good ones would be left out because of a problem that passes.
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

PAUSES = (0.1, 0.4, 1.6, 5.0)  # seconds before each further attempt
_EIO_PAUSES = PAUSES[:2]  # a bad sector stays bad, and the disk has already retried by itself
_LONGEST_WAIT = 30.0  # seconds, however long a server asks to wait

# All others count as an outage: ESTALE, ENOTCONN, EMFILE, ENOMEM, ETIMEDOUT and any that are unknown.
_OF_A_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EILSEQ,  # in its name
    errno.EFBIG,
    errno.EOVERFLOW,
    errno.ENXIO,  # a socket or a pipe
    errno.ENODEV,
    errno.EBADMSG,  # its checksum
    errno.EUCLEAN,  # its metadata in the file system
    errno.ENODATA,
    errno.EIO,
}
# fsspec raises these without an errno.
_ERRORS_OF_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class StorageError(OSError):
    """A file behind a URL cannot be reached; the message names it and says why.

    reason: why, in a few words. passes: whether the same request may succeed later. attempts: how many
    further requests are worth their time. wait: the seconds that the server asks to wait, or 0.
    """

    def __init__(
        self,
        message: str,
        reason: str = "unreadable",
        passes: bool = True,
        attempts: int = 0,
        wait: float = 0.0,
    ):
        super().__init__(message)
        self.reason, self.passes, self.attempts, self.wait = reason, passes, attempts, wait


def is_outage(error: OSError) -> bool:
    """Whether the storage or the process is in trouble, rather than just the requested file."""
    if isinstance(error, StorageError):
        return error.passes
    return not isinstance(error, _ERRORS_OF_A_FILE) and error.errno not in _OF_A_FILE


def patiently(action: Callable[[], T], say: Callable[[str], None]) -> T:
    """Run the action and return its result; in an outage, retry with growing pauses for seven seconds.

    EIO, which may be either an outage or an error of the file, is retried for half a second. say: called with
    a message for people before the first pause. Raises the last OSError.
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
                say(f"{what}: retrying for {sum(pauses):.1f} seconds")
            wait = error.wait if isinstance(error, StorageError) else 0.0
            time.sleep(max(pauses[attempt], min(wait, _LONGEST_WAIT)))
            attempt += 1


def read_patiently(path: Path, size: int | None = None) -> bytes:
    """Read a small file, or its first `size` bytes, with retries. Raises OSError, which names the file."""
    return patiently(partial(read_file, path, size=size), say_on_stderr)


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _pauses(error: OSError) -> tuple[float, ...]:
    if isinstance(error, StorageError):
        return PAUSES[: error.attempts]
    if error.errno == errno.EIO:
        return _EIO_PAUSES
    return PAUSES if error.errno is not None and is_outage(error) else ()
