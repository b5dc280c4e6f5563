"""Read a file behind a URL from its beginning to its end, with the next parts requested ahead."""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from pipeline.packing.storage import read
from pipeline.packing.workers import warn
from pipeline.retry import with_retries
from pipeline.storage import size_of

_PART_BYTES = 8 << 20  # size of a request
_CONNECTIONS = 4  # parts that are requested at once


class RemoteFile(io.RawIOBase):
    """A file behind a URL that is read in order. size: in bytes."""

    def __init__(self, url: str, executor: ThreadPoolExecutor):
        self._url, self._executor = url, executor
        self.size = with_retries(partial(size_of, url), warn)
        self._offsets = iter(range(0, self.size, _PART_BYTES))
        self._parts: deque[Future[bytes]] = deque()
        self._current = memoryview(b"")
        for _ in range(_CONNECTIONS):
            self._request()

    def read(self, size: int = _PART_BYTES) -> bytes:
        """Return at most `size` bytes, and none only at the end. Raises OSError, which names the file."""
        if not self._current and self._parts:
            self._current = memoryview(self._parts.popleft().result())
            self._request()
        data, self._current = self._current[:size], self._current[size:]
        return bytes(data)

    def _request(self) -> None:
        """Request the next part, if there is one."""
        offset = next(self._offsets, None)
        if offset is not None:
            size = min(_PART_BYTES, self.size - offset)
            self._parts.append(self._executor.submit(read, self._url, offset, size))


@contextmanager
def opened(url: str) -> Iterator[RemoteFile]:
    """Open a file behind a URL for the duration of the block. Raises OSError, which names the file."""
    with ThreadPoolExecutor(_CONNECTIONS) as executor:
        try:
            yield RemoteFile(url, executor)
        finally:
            executor.shutdown(cancel_futures=True)
