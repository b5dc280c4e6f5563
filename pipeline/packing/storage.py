"""Access files on this machine and, through fsspec, behind URLs (s3://, gs://, hf://, https://, …).

Failed reads, and listings of this machine's file systems, are retried (pipeline/retry.py). For HTTP, each
request has a time limit, and the proxies of the environment are used.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs

from pipeline.files import path_in_errors, read_file, sync_folder
from pipeline.packing.remote_errors import as_os_error, redact
from pipeline.packing.workers import warn
from pipeline.retry import StorageError, with_retries

if TYPE_CHECKING:
    from aiohttp import TraceConfig

STATE_FOLDER = ".packing"  # subfolder of the output with the state of an unfinished run (resume.py)
MAX_BYTES = 1_000_000_000  # of an image file, which is read as a whole
# Seconds to connect, between two parts of an answer, and for all of it.
_HTTP_SECONDS = {"sock_connect": 15, "sock_read": 30, "total": 120}


def is_url(name: str) -> bool:
    """Return whether a name is a URL, and not a local path."""
    return "://" in name


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder, which any worker can open. URLs are left unchanged."""
    return name if is_url(name) else os.path.abspath(name)  # noqa: PTH100 – unlike Path.absolute, it also collapses `..`


def read(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file from `offset` on: all of it or `size` bytes. Raises OSError, which names the file."""
    return with_retries(partial(read_once, file, offset, size), warn)


def read_once(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file as `read` does, but make a single attempt."""
    if not is_url(file):
        return _read_local(file, offset, size)
    with as_os_error(file):
        fs, path = _file_system(file, MAX_BYTES)
        content = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
    if size is not None and len(content) > size:  # many static file servers send the whole file
        raise StorageError(
            f"{redact(file)}: the server does not support reading parts of files (HTTP ranges)",
            transient=False,
        )
    return content


def _read_local(file: str, offset: int, size: int | None) -> bytes:
    try:
        return read_file(file, offset, size)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), file) from None


def open_file(file: str) -> BinaryIO:
    """Open a file, given by path or URL, for reading. Raises OSError."""
    if not is_url(file):
        return open(file, "rb")
    with as_os_error(file):
        fs, path = _file_system(file)
        return fs.open(path, "rb")


def is_accessible(name: str) -> bool:
    """Return whether this is a file, or a folder that is not empty, that can be accessed."""
    try:
        if not is_url(name):
            if not stat.S_ISDIR(Path(name).stat().st_mode):
                return True
            with os.scandir(name) as entries:
                return any(entries)
        with as_os_error(name):
            fs, path = _file_system(name)
            return fs.info(path)["type"] == "file" or bool(fs.ls(path))
    except OSError:
        return False


class Folder:
    """The folder of a dataset, local or behind a URL. Each method raises OSError."""

    def __init__(self, name: str | Path):
        self.name = absolute(str(name)).rstrip("/")
        self.is_local = not is_url(self.name)
        with as_os_error(self.name):
            self.fs, self.path = _file_system(self.name)

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def staged(self, subfolder: str = ".") -> Iterator[Path]:
        """Provide an empty local folder whose files are moved to this one, or a subfolder, after the block.

        Each file appears only once it is complete, and none appears after an error in the block. Each call
        makes a new folder, so two writers of the same file do not interfere.
        """
        scratch = Path(self.path, STATE_FOLDER) if self.is_local else None
        staging = Path(tempfile.mkdtemp(dir=scratch))
        try:
            yield staging
            target = os.path.normpath(f"{self.path}/{subfolder}")
            for file in sorted({file for file in staging.iterdir() if not file.name.startswith(".")}):
                if self.is_local:
                    file.replace(f"{target}/{file.name}")
                else:
                    with as_os_error(str(self)):
                        self.fs.put_file(str(file), f"{target}/{file.name}")
            if self.is_local:
                sync_folder(Path(target))
        finally:
            # NFS and FUSE keep files that are removed while open for a moment; the next run removes them.
            shutil.rmtree(staging, ignore_errors=True)

    def read(self, name: str, size: int | None = None) -> bytes:
        """Read a file in the folder, or its first `size` bytes."""
        return read(f"{self.name}/{name}", 0, size)

    def sizes(self, subfolder: str = ".") -> dict[str, int]:
        """Return the sizes of all files in the folder, or in a subfolder, in bytes and by name."""
        folder = os.path.normpath(f"{self.path}/{subfolder}")
        if self.is_local:
            return with_retries(partial(_local_sizes, folder), warn)
        with as_os_error(str(self)):
            try:
                found = self.fs.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {Path(entry["name"]).name: entry["size"] for entry in found if entry["type"] == "file"}

    def remove(self, names: Iterable[str]) -> None:
        """Delete files. Local ones may be missing."""
        paths = [f"{self.path}/{name}" for name in names]
        if self.is_local:
            for path in paths:
                Path(path).unlink(missing_ok=True)
        elif paths:
            with as_os_error(str(self)):
                self.fs.rm(paths)


def _local_sizes(folder: str) -> dict[str, int]:
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return {}
    sizes = {}
    with path_in_errors(folder), entries:
        for entry in entries:
            try:
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # removed since the folder was listed
                continue
    return sizes


def _file_system(name: str, max_bytes: int | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    max_bytes: an HTTP response that announces more raises StorageError before it is received.
    """
    if not is_url(name):  # even if the path contains `::`, with which fsspec chains URLs
        return fsspec.filesystem("file"), name
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write to it, too
    if name.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"trust_env": True, "timeout": ClientTimeout(**_HTTP_SECONDS)}
        if max_bytes is not None:
            options["client_kwargs"]["trace_configs"] = [_size_limit(max_bytes)]
    return url_to_fs(name, **options)


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
