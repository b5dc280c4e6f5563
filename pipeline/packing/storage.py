"""Files here and behind URLs (s3://, gs://, hf://, https://, …), by fsspec.

What this machine's file systems fail to read or list is tried again (pipeline/retry.py); for URLs, fsspec
does so.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
from fsspec.core import url_to_fs

from pipeline.files import naming, read_file, sync_folder
from pipeline.packing.workers import say
from pipeline.retry import patiently

UNFINISHED = ".packing"  # what a run needs until its dataset is whole, in the dataset's folder


class StorageError(OSError):
    """A file behind a URL that cannot be reached; the message says why."""


def is_url(name: str) -> bool:
    return "://" in name


def absolute(name: str) -> str:
    """The same file or folder, whatever folder a worker runs in."""
    return name if is_url(name) else os.path.abspath(name)  # noqa: PTH100 – which collapses `..`, too


def read(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on. Raises OSError, which names it."""
    if not is_url(file):
        return patiently(partial(_read_here, file, offset, size), say)
    with _as_os_error(file):
        fs, path = _file_system(file)
        content = fs.cat_file(path, start=offset, end=None if size is None else offset + size)
    if size is not None and len(content) > size:  # many servers of static files send all of it
        raise StorageError(f"{file}: its server does not hand over parts of files (HTTP ranges)")
    return content


def _read_here(file: str, offset: int, size: int | None) -> bytes:
    try:
        return read_file(file, offset, size)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), file) from None


def is_there(name: str) -> bool:
    """Whether a file, or a folder that is not empty, can be looked at."""
    try:
        if not is_url(name):
            if not stat.S_ISDIR(Path(name).stat().st_mode):
                return True
            with os.scandir(name) as entries:
                return any(entries)
        with _as_os_error(name):
            fs, path = _file_system(name)
            return fs.info(path)["type"] == "file" or bool(fs.ls(path))
    except OSError:
        return False


class Folder:
    """A folder to write a dataset to, and to read its files from. Each method raises OSError."""

    def __init__(self, name: str | Path):
        self.name = absolute(str(name)).rstrip("/")
        self.is_local = not is_url(self.name)
        with _as_os_error(self.name):
            self.fs, self.path = _file_system(self.name)

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def staged(self, below: str = ".") -> Iterator[Path]:
        """An empty local folder, whose files come here, or to the folder `below` this, after the block.

        None comes before it is whole, and none after an error in the block. It is a new folder each
        time: two writers of one file do not meet.
        """
        scratch = Path(self.path, UNFINISHED) if self.is_local else None
        staging = Path(tempfile.mkdtemp(dir=scratch))
        try:
            yield staging
            target = os.path.normpath(f"{self.path}/{below}")
            for file in sorted({file for file in staging.iterdir() if not file.name.startswith(".")}):
                if self.is_local:
                    file.replace(f"{target}/{file.name}")
                else:
                    with _as_os_error(str(self)):
                        self.fs.put_file(str(file), f"{target}/{file.name}")
            if self.is_local:
                sync_folder(Path(target))
        finally:
            # What stays, as NFS and FUSE keep for a moment what is removed while open, the next run removes.
            shutil.rmtree(staging, ignore_errors=True)

    def read(self, name: str, size: int | None = None) -> bytes:
        """The bytes of a file in it, or the first `size`."""
        return read(f"{self.name}/{name}", 0, size)

    def sizes(self, below: str = ".") -> dict[str, int]:
        """In bytes, of all files in it or in a folder of it, by name."""
        folder = os.path.normpath(f"{self.path}/{below}")
        if self.is_local:
            return patiently(partial(_sizes_here, folder), say)
        with _as_os_error(str(self)):
            try:
                found = self.fs.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {Path(entry["name"]).name: entry["size"] for entry in found if entry["type"] == "file"}

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that are there."""
        paths = [f"{self.path}/{name}" for name in names]
        if self.is_local:
            for path in paths:
                Path(path).unlink(missing_ok=True)
        elif paths:
            with _as_os_error(str(self)):
                self.fs.rm(paths)


def _sizes_here(folder: str) -> dict[str, int]:
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return {}
    sizes = {}
    with naming(folder), entries:
        for entry in entries:
            try:
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # removed since
                continue
    return sizes


def _file_system(name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if not is_url(name):  # though it had a `::`, which chains URLs
        return fsspec.filesystem("file"), name
    return url_to_fs(name, use_listings_cache=False)  # other processes write there, too


@contextmanager
def _as_os_error(name: str) -> Iterator[None]:
    """Each kind of storage has errors of its own; callers know OSError."""
    try:
        yield
    except OSError:
        raise
    except ImportError as error:  # of the package for that kind of URL
        raise StorageError(f"{name}: {error}") from None
    except ValueError as error:  # an unknown kind
        raise StorageError(f"{name}: {error}") from None
    except Exception as error:
        raise StorageError(f"{name}: {type(error).__name__}: {error}") from error
