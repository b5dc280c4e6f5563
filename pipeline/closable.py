"""The base class of the loaders: closing, pickling, and the refusal to work after a fork."""

import os
from typing import Any, Self

from pipeline.loader_options import LoaderError

_pid = 0  # the process that uses DALI, which does not work in processes that are forked from it


class Closable:
    """A loader that holds the threads and the memory of a stream until it is closed."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._is_closed = False

    def close(self) -> None:
        """End the loader's threads and free its memory. It cannot be used afterwards."""
        self._stream, self._is_closed = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stream": None}

    def _check_is_usable(self) -> None:
        """Raise LoaderError if the loader is closed, or if DALI cannot work in this process."""
        if self._is_closed:
            raise LoaderError("the loader is closed")
        global _pid
        if _pid not in (0, os.getpid()):
            raise LoaderError(
                "a loader was already in use when this process was forked, and DALI's threads do not "
                "survive that: start the process with spawn, or before the first batch"
            )
        _pid = os.getpid()
