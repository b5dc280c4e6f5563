"""Read images from tars without extracting them, including the ILSVRC tars as downloaded.

A class tar is stored uncompressed in the tar of all classes, so each image has an offset in the outer file.
Only headers are read to find it, and each is checked: Python's tarfile would take a damaged header for the
end of the tar.
"""

import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from pipeline.packing import storage
from pipeline.packing.sources.labels import Annotations, is_image
from pipeline.packing.sources.listing import InputFolder, LabelledImage, SourceError, SplitFiles

_BLOCK = 512  # bytes in a block of a tar
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_CONNECTIONS = 32  # each header behind a URL takes a request, which mostly waits
_AHEAD = 8192  # bytes

T = TypeVar("T")
R = TypeVar("R")


class Member(NamedTuple):
    """A file in a tar. offset: of its first byte in the outermost file. size: in bytes."""

    name: str
    offset: int
    size: int


class ReadAhead:
    """Reads like storage.read, but fetches more at a time: small members come together with their headers."""

    def __init__(self, end: int):
        self.end, self.start, self.content = end, 0, b""

    def __call__(self, file: str, offset: int, size: int) -> bytes:
        if not self.start <= offset <= offset + size <= self.start + len(self.content):
            self.start = offset
            self.content = storage.read(file, offset, min(max(size, _AHEAD), self.end - offset))
        return self.content[offset - self.start :][:size]


def members(
    file: str, start: int, end: int, read: Callable[[str, int, int], bytes] = storage.read
) -> Iterator[Member]:
    """Yield the files of the tar between two offsets of a file. Raises SourceError if it is damaged."""
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
                # A long name, for example, comes before its header; tarfile joins them.
                info = tarfile.TarFile(fileobj=BytesIO(extensions + header)).next() or info
        except tarfile.TarError as error:
            raise SourceError(f"{file} is damaged: no valid header at byte {position} ({error})") from None
        offset = position + _BLOCK
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
                f"{file} stores {info.name} as a link or in pieces at byte {offset}: extract the tar"
            )


def read_each(path: str, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `read` of each item in order; if the path is a URL, many are read at once."""
    with ThreadPoolExecutor(_CONNECTIONS if storage.is_url(path) else 1) as pool:
        yield from pool.map(read, items)


def class_tars(folder: InputFolder, name: str) -> SplitFiles:
    """Find the training images in a tar of class tars. Raises SourceError if there are no class tars."""
    file = folder.locate(name)
    outer = list(members(file, 0, folder.size(name)))
    # If two members have the same name, the later one counts, as when they are extracted.
    tars = {PurePosixPath(tar.name).stem: tar for tar in outer if tar.name.endswith(".tar")}
    if not tars:
        raise SourceError(f"{file} contains no class tars (<class>.tar)")
    strays = [f"train/{member.name}" for member in outer if not member.name.endswith(".tar")]
    return SplitFiles(file, list(tars), _images(file, tars), strays)


def _images(file: str, tars: dict[str, Member]) -> Iterator[LabelledImage]:
    for images in read_each(file, partial(_class_images, file), tars.items()):
        yield from images


def _class_images(file: str, class_tar: tuple[str, Member]) -> list[LabelledImage]:
    class_id, tar = class_tar
    found = {member.name: member for member in members(file, tar.offset, tar.offset + tar.size)}
    return [
        LabelledImage(f"train/{class_id}/{name}", class_id, file, *where) for name, *where in found.values()
    ]


def flat_tar(folder: InputFolder, tar: str, annotations: Annotations) -> SplitFiles:
    """Find the images in a tar of validation images, whose labels come from the annotations."""
    file = folder.locate(tar)
    found = {PurePosixPath(member.name).name: member for member in members(file, 0, folder.size(tar))}
    strays = sorted(f"val/{name}" for name in found if not is_image(name))

    def images() -> Iterator[LabelledImage]:
        for name, class_id in annotations.classes(sorted(filter(is_image, found))).items():
            yield LabelledImage(
                f"val/{class_id}/{name}", class_id, file, found[name].offset, found[name].size
            )

    return SplitFiles(file, [], images(), strays)
