"""Find images in tars without extracting them, including the ILSVRC tars as downloaded.

ILSVRC's training tar contains an uncompressed tar for each class, so each image has an offset in the outer
file. Only the headers are read to find it, and each of them is checked: Python's tarfile would take a damaged
header for the end of the tar.
"""

import posixpath
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from pipeline.locations import is_url
from pipeline.packing import storage
from pipeline.packing.sources.compressed import SUFFIXES, CompressedFile, is_compressed
from pipeline.packing.sources.labels import Annotations
from pipeline.packing.sources.listing import InputFolder, LabelledImage, SourceError, SplitFiles, is_image
from pipeline.packing.sources.splits import splits_named

_BLOCK = 512  # bytes in a block of a tar
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_CONNECTIONS = 32  # requests to a URL at once: each header takes one, which mostly waits
_READ_AHEAD_BYTES = 8192

T = TypeVar("T")
R = TypeVar("R")
Read = Callable[[str, int, int], bytes]  # of file, offset and size, like storage.read


class Member(NamedTuple):
    """A file in a tar. offset: of its first byte in the outermost file, in bytes. size: in bytes."""

    name: str
    offset: int
    size: int


class ReadAhead:
    """Reads like storage.read, but at least 8 KiB at a time, so small members come with their headers.

    end: the size of the file, in bytes.
    """

    def __init__(self, end: int):
        self.end, self.start, self.content = end, 0, b""

    def __call__(self, file: str, offset: int, size: int) -> bytes:
        if not self.start <= offset <= offset + size <= self.start + len(self.content):
            self.start = offset
            self.content = storage.read(file, offset, min(max(size, _READ_AHEAD_BYTES), self.end - offset))
        return self.content[offset - self.start :][:size]


@contextmanager
def opened_tar(folder: InputFolder, name: str) -> Iterator[tuple[Read, int, bool]]:
    """Open a tar that may be compressed; provide a function that reads it, its end, and whether it is."""
    file, size = folder.locate(name), folder.size(name)
    read = ReadAhead(size)
    if size and is_compressed(read(file, 0, min(size, 8)), file):
        with CompressedFile(file) as decompressed:
            yield decompressed, sys.maxsize, True
    else:
        yield read, size, False


def members(file: str, start: int, end: int, read: Read = storage.read) -> Iterator[Member]:
    """Yield the files in the tar that is between two byte offsets of a file.

    Raises SourceError if the tar is damaged or has links, and OSError.
    """
    position, extensions = start, b""
    while True:
        if position + _BLOCK > end:
            raise SourceError(f"{file} is truncated: the tar does not end properly at byte {end}")
        header = read(file, position, _BLOCK)
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            if extensions and info.type not in _EXTENSIONS:
                # A long name, for example, is in an extension before the header; tarfile joins the two.
                info = tarfile.TarFile(fileobj=BytesIO(extensions + header)).next() or info
        except tarfile.TarError as error:
            raise SourceError(f"{file} is damaged: no valid header at byte {position} ({error})") from None
        except ValueError:  # the map of a sparse file's pieces is in its contents, which tarfile does not see
            raise SourceError(
                f"{file} is damaged at byte {position}, or stores the file there in pieces: extract the tar"
            ) from None
        offset = position + _BLOCK
        if info.issparse():
            raise SourceError(f"{file} stores {info.name} at byte {offset} in pieces: extract the tar")
        if not 0 <= info.size <= end - offset:
            raise SourceError(
                f"{file} is truncated or damaged: {info.name} at byte {position} extends beyond its end"
            )
        position = offset + -(-info.size // _BLOCK) * _BLOCK
        if info.type in _EXTENSIONS:
            extensions += read(file, offset - _BLOCK, position - offset + _BLOCK)
            continue
        extensions = b""
        if info.type in _FILES:
            yield Member(posixpath.normpath(info.name), offset, info.size)
        elif not info.isdir():
            raise SourceError(
                f"{file} stores {info.name} at byte {offset} as a link or in pieces: extract the tar"
            )


def read_each(path: str, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `read(item)` for each item, in order; many are read at once if the path is a URL."""
    with ThreadPoolExecutor(_CONNECTIONS if is_url(path) else 1) as pool:
        yield from pool.map(read, items)


def class_tars(folder: InputFolder, name: str) -> SplitFiles:
    """Find the training images in a tar of class tars. Raises SourceError if there are none, and OSError."""
    file = folder.locate(name)
    outer = [tar for tar in members(file, 0, folder.size(name)) if folder.wants(f"{name}/{tar.name}")]
    # If two members have the same name, the later one counts, as it would after extraction.
    tars = {PurePosixPath(tar.name).stem: tar for tar in outer if tar.name.endswith(".tar")}
    if not tars:
        raise SourceError(f"{file} contains no class tars (<class>.tar)")
    strays = [f"train/{member.name}" for member in outer if not member.name.endswith(".tar")]
    return SplitFiles(file, list(tars), _images(folder, file, tars), strays)


def _images(folder: InputFolder, file: str, tars: dict[str, Member]) -> Iterator[LabelledImage]:
    for images in read_each(file, partial(_class_images, folder, file), tars.items()):
        yield from images


def _class_images(folder: InputFolder, file: str, class_tar: tuple[str, Member]) -> list[LabelledImage]:
    class_id, tar = class_tar
    found = _unique(folder, f"train/{class_id}", members(file, tar.offset, tar.offset + tar.size))
    return [LabelledImage(f"train/{class_id}/{name}", class_id, file, *where) for name, *where in found]


def _unique(folder: InputFolder, path: str, found: Iterable[Member]) -> Iterable[Member]:
    """Return the members of a tar by name, without litter. path: of the tar, to note litter by."""
    return {member.name: member for member in found if folder.wants(f"{path}/{member.name}")}.values()


def is_folder_of_class_tars(folder: InputFolder, subfolder: str) -> bool:
    """Return whether a folder has only tars, whose names are the classes of the images in them."""
    tars = _tars_by_class(folder, subfolder)
    if not tars or folder.entries(subfolder)[0] or any(map(splits_named, tars)):
        return False
    first = next(iter(tars.values()))
    with opened_tar(folder, first) as (read, end, _):
        has_image = False
        for member in members(folder.locate(first), 0, end, read):
            if member.name.endswith(".cls"):  # it is a WebDataset tar, whose first sample says so
                return False
            has_image |= is_image(member.name)
    return has_image


def folder_of_class_tars(folder: InputFolder, subfolder: str, split: str) -> SplitFiles:
    """Find the images in a folder of class tars, each named <class>.tar, and perhaps compressed."""
    tars = _tars_by_class(folder, subfolder)
    images: list[LabelledImage] = []
    sequential = set()
    for class_id, tar in tars.items():
        file = folder.locate(tar)
        with opened_tar(folder, tar) as (read, end, is_compressed):
            found = _unique(folder, tar, members(file, 0, end, read))
        path = f"{split}/{class_id}" if split else class_id
        images += [LabelledImage(f"{path}/{name}", class_id, file, *where) for name, *where in found]
        if is_compressed:
            sequential.add(file)
    used = {PurePosixPath(tar).name for tar in tars.values()}
    strays = [f"{split}/{name}".lstrip("/") for name in folder.entries(subfolder)[1] if name not in used]
    return SplitFiles(folder.locate(subfolder), list(tars), images, strays, frozenset(sequential))


def _tars_by_class(folder: InputFolder, subfolder: str) -> dict[str, str]:
    return {
        name.removesuffix(ending): f"{subfolder}/{name}" if subfolder else name
        for name in folder.entries(subfolder)[1]
        for ending in (".tar", *SUFFIXES)
        if name.endswith(ending)
    }


def flat_tar(folder: InputFolder, tar: str, annotations: Annotations) -> SplitFiles:
    """Find the validation images in a tar, whose labels come from the annotations.

    Raises SourceError if the tar is damaged, and OSError; iterating over the images may raise the same.
    """
    file = folder.locate(tar)
    members_ = _unique(folder, tar, members(file, 0, folder.size(tar)))
    found = {PurePosixPath(member.name).name: member for member in members_}
    strays = sorted(f"val/{name}" for name in found if not is_image(name))

    def images() -> Iterator[LabelledImage]:
        for name, class_id in annotations.classes(sorted(filter(is_image, found))).items():
            yield LabelledImage(
                f"val/{class_id}/{name}", class_id, file, found[name].offset, found[name].size
            )

    return SplitFiles(file, [], images(), strays)
