"""Read the files of a shard, and distinguish a file that cannot be read from storage that is unavailable.

A file with a permanent error is rejected. A transient error, of a server for example, is retried. If it
persists, other files of the shard decide: the file is rejected if another one of the same host can be read at
that time. If none can, the host is considered unavailable, and the run ends, to be continued later. There is
an exception if only a few files are from that host and other hosts can be read: then these few are rejected.
"""

import errno
import os
import stat
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from pipeline.locations import is_url
from pipeline.packing.images import RejectedError
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.storage import read
from pipeline.packing.workers import warn
from pipeline.remote_errors import HOST_NOT_FOUND, host_of, reason_of, redact
from pipeline.retry import StorageError, is_outage, with_retries
from pipeline.storage import MAX_BYTES, is_accessible, read_once

READ_AHEAD = 16  # files behind URLs that are requested at once, as each request mostly waits
_MANY = 16  # if this many files of a shard are from one host and fail, the host is unavailable
_PROBES = 3  # files that are read to find out whether a host is unavailable


class PackingError(RuntimeError):
    """A packing run cannot continue; the message says why and what to do."""


def contents(
    sources: Sequence[SourceImage], table: str | None = None
) -> Iterator[tuple[SourceImage, Callable[[], bytes]]]:
    """Yield each source with a function that returns its bytes; sources behind URLs are read ahead.

    table: the table that names the sources, if one does. The function raises RejectedError if the file is at
    fault, else OSError or PackingError.
    """
    hosts = _Hosts(sources)
    with ThreadPoolExecutor(READ_AHEAD) as pool:  # starts threads only when they are needed
        ahead: deque[tuple[SourceImage, Callable[[], bytes]]] = deque()
        for source in sources:
            content = partial(_read, source, table)
            early = pool.submit(content).result if is_url(source.file) else content
            ahead.append((source, partial(hosts.read_or_reject, source, early)))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
        yield from ahead


class _Hosts:
    """The hosts of a shard's files: which files of each could be read, and which could not."""

    def __init__(self, sources: Sequence[SourceImage]):
        self._sources = sources
        self._read: dict[str, SourceImage] = {}  # the last one of each host
        self._failed: defaultdict[str, list[SourceImage]] = defaultdict(list)

    def read_or_reject(self, source: SourceImage, content: Callable[[], bytes]) -> bytes:
        """Return the content of a source.

        Raises RejectedError if only this source cannot be read, and StorageError if its host is unavailable.
        """
        host = host_of(source.file)
        try:
            result = content()
        except StorageError as error:
            self._failed[host].append(source)
            if self._is_unavailable(host, error):
                raise StorageError(f"{error}, and no other file of {host} can be read") from None
            raise RejectedError(error.reason) from None
        self._read[host] = source
        return result

    def _is_unavailable(self, host: str, error: StorageError) -> bool:
        if host in self._read:
            return not _can_read(self._read[host], read)
        if any(map(_can_read, self._untried(host, same=True))):
            return False
        if len(self._failed[host]) >= _MANY and error.reason != HOST_NOT_FOUND:
            return True
        others = [*self._read.values()][-_PROBES:] or self._untried(host, same=False)
        return not any(map(_can_read, others))

    def _untried(self, host: str, same: bool) -> list[SourceImage]:
        """Return up to _PROBES sources of the same host, or of others, that did not fail."""
        found = (
            source
            for source in self._sources
            if (host_of(source.file) == host) == same and source not in self._failed[host_of(source.file)]
        )
        return list(islice(found, _PROBES))


def _can_read(source: SourceImage, reader: Callable[[str, int, int | None], bytes] = read_once) -> bool:
    try:
        reader(source.file, source.offset, source.size)
    except OSError:
        return False
    return True


def _read(source: SourceImage, table: str | None) -> bytes:
    """Read a source. Raises RejectedError if the file is at fault, else OSError or PackingError."""
    try:
        size = source.size
        if not is_url(source.file):
            status = with_retries(partial(os.stat, source.file), warn)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe, for example, might never end
                raise RejectedError("unreadable")
            size = status.st_size if size is None else size
        if (size or 0) > MAX_BYTES:
            raise RejectedError("too large")
        return read(source.file, source.offset, source.size)
    except OSError as error:
        if is_outage(error):
            raise
        _check_storage(source, table, error)
        raise RejectedError(reason_of(source.file, error)) from None


def _check_storage(source: SourceImage, table: str | None, error: OSError) -> None:
    """Raise PackingError if not only this file is missing, but also its folder or table, or its whole tar."""
    origin = table or source.file.rpartition("/")[0]
    if not is_accessible(origin):
        why = f"{redact(origin)} cannot be read or is empty: is its storage still mounted?"
    elif source.size is not None and error.errno != errno.EIO:
        why = "it contains other images too."
    else:
        return
    reason = error.strerror or reason_of(source.file, error)
    raise PackingError(
        f"{redact(source.file)} cannot be read ({reason}), and {why} "
        "Finished shards are kept: fix the cause and run the same command again to continue"
    ) from None
