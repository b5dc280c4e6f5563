"""Whose trouble an error is: a file's own, or the storage's and the process's, which is tried again.

A mount that went away, a server that restarts or a process without a free descriptor fails for one file
after another. Were that taken for many bad files, good ones would be left out for a trouble that passes.
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
_EIO_PAUSES = PAUSES[:2]  # a bad sector stays bad, and a disk has tried again by itself

# All others are an outage: ESTALE, ENOTCONN, EMFILE, ENOMEM, ETIMEDOUT and those that nobody thought of.
_OF_A_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EILSEQ,  # of its name
    errno.EFBIG,
    errno.EOVERFLOW,
    errno.ENXIO,  # a socket or a pipe
    errno.ENODEV,
    errno.EBADMSG,  # its checksum
    errno.EUCLEAN,  # its file system's records of it
    errno.ENODATA,
    errno.EIO,
}
# fsspec raises them without a number.
_ERRORS_OF_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def is_outage(error: OSError) -> bool:
    """Whether the storage or the process is in trouble, and not just the file that was asked for."""
    return not isinstance(error, _ERRORS_OF_A_FILE) and error.errno not in _OF_A_FILE


def patiently(action: Callable[[], T], say: Callable[[str], None]) -> T:
    """What the action returns, tried again with growing pauses, seven seconds in all, during an outage.

    EIO, which may pass and may be a file's own, is given half a second. say: is told before the first
    pause, for people. Raises the last OSError.
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
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
                say(f"{what}: trying again for {sum(pauses):.1f} seconds")
            time.sleep(pauses[attempt])
            attempt += 1


def read_patiently(path: Path, size: int | None = None) -> bytes:
    """The content of a small file, or its first `size` bytes. Raises OSError, which names it."""
    return patiently(partial(read_file, path, size=size), say_on_stderr)


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _pauses(error: OSError) -> tuple[float, ...]:
    if error.errno == errno.EIO:
        return _EIO_PAUSES
    # An error without a number is of a URL, which its library has tried again.
    return PAUSES if error.errno is not None and is_outage(error) else ()
