"""List the files of an input folder, which is local or behind a URL."""

import errno
import os
import stat
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipeline.files import path_in_errors
from pipeline.packing import storage
from pipeline.packing.workers import warn
from pipeline.retry import is_outage, with_retries


class SourceError(ValueError):
    """The input cannot be packed; the message says what is wrong and what to do."""


class LabelledImage(NamedTuple):
    """An image and its class. The other fields are those of find.SourceImage."""

    path: str
    class_id: str
    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class SplitFiles:
    """The files found for a split.

    location: where they are, for messages. classes: class ids, including those without images. strays: files
    that belong to no class. sealed: files that can only be read from front to end, such as compressed tars;
    their images are extracted before packing. The offset of an image in one of these counts decompressed
    bytes or, in a Parquet file, rows.
    """

    location: str
    classes: list[str]
    images: Iterable[LabelledImage]
    strays: list[str] = field(default_factory=list)
    sealed: frozenset[str] = frozenset()


class LocalFolder:
    """A local input folder. If a folder cannot be listed, this raises OSError: it may not be empty."""

    def __init__(self, root: str):
        self.name = root
        self.root = Path(storage.absolute(root))

    def entries(self, subfolder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the folders and files in a subfolder, sorted, or none if it does not exist."""
        try:
            return _list_folder(f"{self.root}/{subfolder}")
        except (FileNotFoundError, NotADirectoryError):
            if not subfolder:
                raise
            return [], []

    def files(self, subfolder: str) -> list[str]:
        """Return the paths of all files at any depth in a subfolder, relative to it and sorted."""
        folder = f"{self.root}/{subfolder}"
        found: list[str] = []
        seen, waiting = {_real_path(folder)}, [""]
        while waiting:
            prefix = waiting.pop()
            folders, names = _list_folder(f"{folder}/{prefix}")
            found.extend(f"{prefix}{name}" for name in names)
            # Of several links to a folder, only the first by name is followed. Cycles of links end at `seen`.
            real = {_real_path(f"{folder}/{prefix}{name}"): name for name in reversed(folders)}
            waiting += sorted((f"{prefix}{real[path]}/" for path in real.keys() - seen), reverse=True)
            seen.update(real)
        return sorted(found)

    def locate(self, name: str) -> str:
        """Return the full path of a file."""
        return f"{self.root}/{name}"  # pathlib would keep every file name in memory

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return (self.root / name).stat().st_size


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, sorted and without duplicates."""

    def scan() -> dict[str, bool]:
        with path_in_errors(folder), os.scandir(folder) as entries:
            return {entry.name: _is_folder(entry) for entry in entries}

    found = sorted(with_retries(scan, warn).items())
    return [name for name, is_folder in found if is_folder], [n for n, is_folder in found if not is_folder]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if is_outage(error) or error.errno == errno.EIO:
            raise
        return False  # a broken link, which is reported when it is read


def _real_path(path: str) -> str:
    return with_retries(partial(os.path.realpath, path, strict=True), warn)


class RemoteFolder:
    """An input folder behind a URL, with the methods of LocalFolder.

    It is listed once, at the start. Links and empty folders do not exist there.
    """

    def __init__(self, url: str):
        self.name = url.rstrip("/")
        with _as_source_error(url):
            folder = storage.Folder(url)
            self._fs, self._root = folder.fs, folder.path.rstrip("/")
            start = len(self._root) + 1
            self._names = sorted({name[start:] for name in _find(self._fs, self._root) if name[-1] != "/"})
        if not self._names:
            with suppress(FileNotFoundError), _as_source_error(url):
                self._fs.ls(self._root)  # raises the error, if any, that fsspec's `find` ignores
            raise SourceError(f"--input {url} is not a folder, or it is empty")

    def entries(self, subfolder: str = "") -> tuple[list[str], list[str]]:
        names = self.files(subfolder)
        folders = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
        return list(folders), [name for name in names if "/" not in name]

    def files(self, subfolder: str) -> list[str]:
        prefix = f"{subfolder}/" if subfolder else ""
        first, last = (bisect_left(self._names, edge) for edge in (prefix, f"{prefix}\U0010ffff"))
        return [name[len(prefix) :] for name in self._names[first:last]]

    def locate(self, name: str) -> str:
        return f"{self.name}/{name}"

    def size(self, name: str) -> int:
        with _as_source_error(self.locate(name)):
            return int(self._fs.size(f"{self._root}/{name}"))


def _find(fs: AbstractFileSystem, root: str) -> list[str]:
    """Return the paths of all files at any depth in a folder. Raises an error if one cannot be listed."""
    is_async = isinstance(fs, AsyncFileSystem)
    overridden = (
        type(fs)._find is not AsyncFileSystem._find
        if is_async
        else type(fs).find is not AbstractFileSystem.find
    )
    if overridden:
        return fs.find(root)
    found, waiting, seen = [], [root], {root}  # fsspec's generic `find` skips folders it cannot list
    while waiting:
        folder = waiting.pop()
        try:
            entries = fs.ls(folder, detail=True)
        except FileNotFoundError:
            if folder == root:
                return []
            raise
        folders = {entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"} - seen
        found += [entry["name"] for entry in entries if entry["type"] != "directory"]
        waiting += folders
        seen |= folders
    return found


InputFolder = LocalFolder | RemoteFolder


def open_folder(name: str) -> InputFolder:
    """Open an input folder, given by path or URL. Raises SourceError if there is none, and OSError."""
    if storage.is_url(name):
        return RemoteFolder(name)
    with suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISDIR(with_retries(Path(name).stat, warn).st_mode):
            return LocalFolder(name)
    raise SourceError(f"--input {name} is neither a folder nor a table (.csv, .tsv or .parquet)")


def open_file(name: str) -> BinaryIO:
    """Open a file, given by path or URL, for reading. Raises SourceError or OSError if that fails."""
    if not storage.is_url(name):
        return open(name, "rb")
    folder, _, file = name.rpartition("/")
    with _as_source_error(name):
        opened = storage.Folder(folder)
        return opened.fs.open(f"{opened.path.rstrip('/')}/{file}", "rb")


@contextmanager
def _as_source_error(name: str) -> Iterator[None]:
    """Turn the errors that the various kinds of storage raise into SourceError, except FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise SourceError(f"{name} cannot be read: {error or type(error).__name__}") from error
