"""List the files of a local input folder; remote.py lists those behind a URL."""

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.files import path_in_errors
from pipeline.packing.sources.litter import litter_in
from pipeline.packing.workers import warn
from pipeline.retry import is_outage, with_retries
from pipeline.storage import absolute

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  # endings of names


class SourceError(ValueError):
    """The input cannot be packed; the message says what is wrong and what to do."""


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its name."""
    return name.lower().rpartition(".")[2] in IMAGES


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
    that belong to no class. sequential: files that can only be read from front to end, such as compressed
    tars; their images are extracted before packing. The offset of an image in one of these counts
    decompressed bytes or, in a Parquet file, rows. unused: names of what belongs to no split that is packed,
    such as the folder test. warnings: sentences about probable mistakes. incomplete: classes with folders
    that could not be listed. The last three are complete only after iterating over all images.
    """

    location: str
    classes: list[str]
    images: Iterable[LabelledImage]
    strays: list[str] = field(default_factory=list)
    sequential: frozenset[str] = frozenset()
    unused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    incomplete: set[str] = field(default_factory=set)


class InputFolder(ABC):
    """An input folder, which is local or behind a URL.

    name: its path or URL as given. litter: paths of the files and folders that were passed over. unlisted:
    the reason for each folder that could not be listed, which may not be empty.
    """

    def __init__(self, name: str):
        self.name = name
        self.litter: set[str] = set()
        self.unlisted: dict[str, str] = {}

    @abstractmethod
    def entries(self, subfolder: str = "") -> tuple[list[str], list[str]]:
        """Return the names of the folders and files in a subfolder, sorted.

        Raises OSError or SourceError if there is no such folder, or if it cannot be listed.
        """

    @abstractmethod
    def files(self, subfolder: str) -> list[str]:
        """Return the paths of all files at any depth in a subfolder, relative to it and sorted.

        Folders that cannot be listed are added to `unlisted`. Raises OSError or SourceError if the storage is
        at fault, or the folder is the input itself.
        """

    @abstractmethod
    def locate(self, name: str) -> str:
        """Return the full path or URL of a file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises OSError or SourceError."""

    def has(self, path: str) -> bool:
        """Return whether there is a folder with this path."""
        above, _, name = path.rpartition("/")
        return (not above or self.has(above)) and name in self.entries(above)[0]

    def is_complete(self, subfolder: str) -> bool:
        """Return whether a subfolder and all folders in it could be listed."""
        return not any(f"{path}/".startswith(f"{subfolder}/") for path in self.unlisted)

    def wants(self, path: str) -> bool:
        """Return whether a path is not litter, and note it if it is."""
        litter = litter_in(path)
        if litter is not None:
            self.litter.add(litter)
        return litter is None


class LocalFolder(InputFolder):
    """A local input folder."""

    def __init__(self, root: str):
        super().__init__(root)
        self.root = Path(absolute(root))

    def entries(self, subfolder: str = "") -> tuple[list[str], list[str]]:
        folders, names = _list_folder(f"{self.root}/{subfolder}")
        prefix = f"{subfolder}/" if subfolder else ""
        return [n for n in folders if self.wants(prefix + n)], [n for n in names if self.wants(prefix + n)]

    def files(self, subfolder: str) -> list[str]:
        start = f"{subfolder}/" if subfolder else ""
        found: list[str] = []
        seen, waiting = set[str](), [start]
        if itself := self._real(start):
            seen.add(itself)
        while waiting:
            prefix = waiting.pop()
            folders, names = self._entries_if_listed(prefix)
            found.extend(f"{prefix}{name}"[len(start) :] for name in names)
            # Of several links to a folder, only the first by name is followed. Cycles of links end at `seen`.
            real = {path: name for name in reversed(folders) if (path := self._real(f"{prefix}{name}/"))}
            waiting += sorted((f"{prefix}{real[path]}/" for path in real.keys() - seen), reverse=True)
            seen.update(real)
        return sorted(found)

    def _entries_if_listed(self, prefix: str) -> tuple[list[str], list[str]]:
        with self._left_out_if_unlisted(prefix):
            return self.entries(prefix.rstrip("/"))
        return [], []

    def _real(self, prefix: str) -> str | None:
        """Return the path of a folder without links, or None if it has none."""
        with self._left_out_if_unlisted(prefix):
            return _real_path(f"{self.root}/{prefix}")
        return None

    @contextmanager
    def _left_out_if_unlisted(self, prefix: str) -> Iterator[None]:
        """Note a folder that cannot be listed in the block. Raises OSError if its storage is at fault."""
        path = prefix.rstrip("/")
        try:
            yield
            self.unlisted.pop(path, None)
        except OSError as error:
            if not path or is_outage(error):
                raise
            self.unlisted[path] = error.strerror or str(error)

    def locate(self, name: str) -> str:
        # pathlib would keep every file name in memory
        return f"{self.root}/{name}" if name else str(self.root)

    def size(self, name: str) -> int:
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
        if not entry.is_dir() and entry.is_symlink():
            entry.stat()  # is_dir is also False for a link that leads nowhere
        return entry.is_dir()
    except OSError as error:
        if is_outage(error) or error.errno == errno.EIO:
            raise
        # Where the link leads cannot be known: listing the folder, or reading the image, reports the reason.
        return not is_image(entry.name)


def _real_path(path: str) -> str:
    return with_retries(partial(os.path.realpath, path, strict=True), warn)
