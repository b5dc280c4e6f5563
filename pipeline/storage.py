"""Access files on this machine and, through fsspec, behind URLs (s3://, gs://, hf://, https://, …).

For HTTP, each request has a time limit, and the proxies of the environment are used.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from io import SEEK_SET, BufferedReader, RawIOBase
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.files import read_file
from pipeline.locations import Location, is_url
from pipeline.remote_errors import as_os_error, redact
from pipeline.retry import StorageError, read_with_retries, with_retries

if TYPE_CHECKING:
    from aiohttp import TraceConfig
    from fsspec import AbstractFileSystem
    from typing_extensions import Buffer

MAX_BYTES = 1_000_000_000  # of a file that is read as a whole
_BUFFER_BYTES = 1 << 20  # of an open file behind a URL
# Seconds to connect, between two parts of an answer, and for all of it.
_HTTP_SECONDS = {"sock_connect": 15, "sock_read": 30, "total": 120}
_S3_SECONDS = {"connect_timeout": 15, "read_timeout": 30}
# By default, all threads of a process share ten, so that samples would wait for the parts of shards.
_S3_CONNECTIONS = {"max_pool_connections": 64}


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder, which any worker can open. URLs are left unchanged."""
    return name if is_url(name) else os.path.abspath(name)  # noqa: PTH100 – unlike Path.absolute, it also collapses `..`


def read_once(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file from `offset` on: all of it or `size` bytes.

    It makes a single attempt. Raises OSError, which names the file.
    """
    if not is_url(file):
        return _read_local(file, offset, size)
    with as_os_error(file):
        fs, path = file_system(file, MAX_BYTES)
        content = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
        if content is None:  # s3fs has closed its connections, because this process is ending
            raise StorageError(f"{redact(file)}: broken off", "broken off")
    if size is not None and len(content) > size:  # many static file servers send the whole file
        raise _no_ranges(file)
    return content


def _read_local(file: str, offset: int, size: int | None) -> bytes:
    try:
        return read_file(file, offset, size)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), file) from None


def open_file(file: str) -> BinaryIO:
    """Open a file, given by path or URL, for reading. Raises OSError.

    Outages of a URL are retried, while it is opened and whenever it is read, and then raise OSError.
    """
    if not is_url(file):
        return open(file, "rb")
    opened = with_retries(partial(_open_url, file))
    return BufferedReader(_RemoteFile(file, opened), _BUFFER_BYTES)


class _RemoteFile(RawIOBase):
    """A file behind a URL that is opened for reading. Its errors are OSErrors that name it."""

    def __init__(self, name: str, opened: BinaryIO):
        self._name, self._file = name, opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        with as_os_error(self._name):
            try:
                self._file.seek(offset, whence)
            except ValueError:
                raise _no_ranges(self._name) from None
        return self._file.tell()

    def readinto(self, buffer: "Buffer") -> int:
        target, start, attempts = memoryview(buffer).cast("B"), self._file.tell(), count()

        def read() -> bytes:
            if next(attempts):
                self._reopen(start)
            with as_os_error(self._name):
                return self._file.read(len(target))

        content = with_retries(read)
        target[: len(content)] = content
        return len(content)

    def _reopen(self, position: int) -> None:
        """Open the file again, because a broken connection stays so, and go to a position."""
        self._file.close()
        self._file = _open_url(self._name)
        with as_os_error(self._name):
            try:
                self._file.seek(position)
            except ValueError:  # the server sends only whole files
                while (rest := position - self._file.tell()) and self._file.read(min(rest, _BUFFER_BYTES)):
                    pass

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()


def _open_url(name: str) -> BinaryIO:
    with as_os_error(name):
        fs, path = file_system(name)
        with _naming_cause(name):
            return fs.open(path, "rb")


def _no_ranges(file: str) -> StorageError:
    return StorageError(
        f"{redact(file)}: the server does not support reading parts of files (HTTP ranges)", transient=False
    )


def size_of(file: str) -> int:
    """Return the size of a file behind a URL, in bytes. Raises OSError."""
    with as_os_error(file):
        fs, path = file_system(file)
        with _naming_cause(file):
            size = fs.size(path)
    if size is None:
        raise StorageError(f"{redact(file)}: the server does not say how large it is", transient=False)
    return size


@contextmanager
def _naming_cause(file: str) -> Iterator[None]:
    """Raise why a request failed; over HTTP, fsspec calls the file missing whatever the reason."""
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or not _is_http(file) or getattr(cause, "status", None) == 404:
            raise
        raise cause from None


def is_accessible(name: str) -> bool:
    """Return whether this is a file, or a folder that is not empty, that can be accessed."""
    try:
        if not is_url(name):
            if not stat.S_ISDIR(Path(name).stat().st_mode):
                return True
            with os.scandir(name) as entries:
                return any(entries)
        with as_os_error(name):
            fs, path = file_system(name)
            return fs.info(path)["type"] == "file" or bool(fs.ls(path))
    except OSError:
        return False


def read_start(location: Location, size: int) -> bytes:
    """Read a file, or its first `size` bytes, and retry outages. Raises OSError, which names the file."""
    if isinstance(location, Path):
        return read_with_retries(location, size)
    return with_retries(partial(read_once, location))[:size]


def file_system(name: str, max_bytes: int | None = None) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of a path or URL, and the path in it.

    max_bytes: an HTTP response that announces more raises StorageError before it is received.
    """
    import fsspec  # here, because programs that read local datasets need not wait for it

    if not is_url(name):  # even if the path contains `::`, with which fsspec chains URLs
        return fsspec.filesystem("file"), name
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write to it, too
    if name.startswith("s3://"):
        options["config_kwargs"] = _S3_SECONDS | _S3_CONNECTIONS
    if _is_http(name):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"trust_env": True, "timeout": ClientTimeout(**_HTTP_SECONDS)}
        if max_bytes is not None:
            options["client_kwargs"]["trace_configs"] = [_size_limit(max_bytes)]
    return fsspec.url_to_fs(name, **options)


def _is_http(name: str) -> bool:
    return name.startswith(("http://", "https://"))


@cache  # because fsspec compares options by their representation, to use a connection again
def _size_limit(max_bytes: int) -> "TraceConfig":
    from aiohttp import TraceConfig

    async def refuse_large(session, context, request) -> None:
        if (request.response.content_length or 0) > max_bytes:
            request.response.close()
            raise StorageError(f"{redact(str(request.url))}: too large", "too large", transient=False)

    trace = TraceConfig()
    trace.on_request_end.append(refuse_large)
    return trace
