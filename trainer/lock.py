"""Lock a file for the only process that may train a run."""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pipeline.files import held_open
from pipeline.output import say

_LOCKED = {errno.EAGAIN, errno.EACCES}  # by another process; SMB servers report the latter


class LockedError(Exception):
    """Another process has locked the file. The message names the process."""


def open_locked(path: Path) -> TextIO:
    """Open and lock a file, and return it; closing it unlocks it, and so does the end of the process.

    Some network file systems do not support locks, which is reported. Raises LockedError if another process
    has locked the file, and OSError if it cannot be opened.
    """
    lock = open(path, "a+", errors="replace")  # noqa: SIM115 – the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKED:
            with held_open(lock):
                raise LockedError(_owner(lock)) from None
        say(f"{path.parent} cannot be locked ({error.strerror}): make sure that no other process uses it")
    with suppress(OSError):  # the content is only for messages
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _owner(lock: TextIO) -> str:
    """Return what the process that holds the lock has written into it: its ID and its host."""
    with suppress(OSError):  # some file systems do not allow reading a locked file
        lock.seek(0)
        return lock.read().strip() or "another process"
    return "another process"
