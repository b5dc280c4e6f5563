"""List the files of an input folder behind a URL."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipeline.packing import storage
from pipeline.packing.sources.listing import InputFolder, SourceError, is_image
from pipeline.packing.workers import warn
from pipeline.remote_errors import as_os_error, reason_of
from pipeline.retry import StorageError, is_outage, with_retries

_LINKS = ("link", "other")  # types of entries that are neither files nor folders

T = TypeVar("T")


class RemoteFolder(InputFolder):
    """A folder behind a URL. It is listed once, and has no links and no empty folders."""

    def __init__(self, url: str):
        super().__init__(url.rstrip("/"))
        folder = storage.Folder(url)
        self._fs, self._root = folder.fs, folder.path.rstrip("/")
        self._names = sorted(filter(self.wants, set(self._find())))
        if not self._names:
            with suppress(FileNotFoundError):  # the other errors, if any, are those that `find` ignores
                self._call("", lambda: self._fs.ls(self._root))
            raise SourceError(f"--input {url} is not a folder, or it is empty")

    def _find(self) -> Iterator[str]:
        """Yield the paths of all files and, followed by `/`, of the folders that cannot be listed."""
        start = len(self._root) + 1
        if _has_flat_listing(self._fs):
            names = self._call("", lambda: self._fs.find(self._root))
            yield from (name[start:] for name in names if name[-1] != "/")
            return
        waiting, seen = [self._root], {self._root}
        while waiting:  # fsspec's generic `find` skips folders it cannot list
            folder = waiting.pop()
            entries = self._listed(folder)
            if entries is None:
                yield f"{folder[start:]}/"
                continue
            folders = {entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"} - seen
            for name, kind in ((entry["name"][start:], entry["type"]) for entry in entries):
                if kind in _LINKS and not is_image(name):
                    self.unlisted[name] = "it is a link, which may lead to a folder"
                    yield f"{name}/"
                elif kind != "directory":
                    yield name
            waiting += [name for name in folders if self.wants(name[start:])]
            seen |= folders

    def _listed(self, folder: str) -> list[dict] | None:
        """Return the entries of a folder, or None if it is noted as one that cannot be listed.

        Raises OSError if the server is at fault, or the folder is the input itself.
        """
        path = folder[len(self._root) + 1 :]
        try:
            return self._call(path, lambda: self._fs.ls(folder, detail=True))
        except FileNotFoundError:
            if not path:
                return []
            self.unlisted[path] = "it no longer exists"
        except OSError as error:
            if not path or is_outage(error):
                raise
            self.unlisted[path] = reason_of(self.locate(path), error)
        return None

    def _call(self, path: str, function: Callable[[], T]) -> T:
        """Call a function of the file system, with retries. Raises OSError, which names the path."""

        def call() -> T:
            with as_os_error(self.locate(path)):
                return function()

        return with_retries(call, warn)

    def entries(self, subfolder: str = "") -> tuple[list[str], list[str]]:
        if subfolder in self.unlisted:
            raise StorageError(f"{self.locate(subfolder)} cannot be listed: {self.unlisted[subfolder]}")
        names = self._below(subfolder)
        folders = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
        return list(folders), [name for name in names if "/" not in name]

    def files(self, subfolder: str) -> list[str]:
        return [name for name in self._below(subfolder) if name and name[-1] != "/"]

    def _below(self, subfolder: str) -> list[str]:
        prefix = f"{subfolder}/" if subfolder else ""
        first, last = (bisect_left(self._names, edge) for edge in (prefix, f"{prefix}\U0010ffff"))
        return [name[len(prefix) :] for name in self._names[first:last]]

    def locate(self, name: str) -> str:
        return f"{self.name}/{name}" if name else self.name

    def size(self, name: str) -> int:
        return int(self._call(name, lambda: self._fs.size(f"{self._root}/{name}")))


def _has_flat_listing(fs: AbstractFileSystem) -> bool:
    """Return whether a file system lists a whole tree at once, as object stores do."""
    if hasattr(fs, "fs"):  # it forwards to another one
        return False
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not AbstractFileSystem.find
