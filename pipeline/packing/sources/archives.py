"""Tars read where they lie, and ILSVRC's as they are downloaded.

A class tar is stored uncompressed in the tar of all classes, so an image has one place in the outer
file. Only headers are read to find it, and each is checked: Python's tarfile would take a damaged
header for the end.
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
from pipeline.packing.sources.listing import InputFolder, Labelled, SourceError, SplitFiles

_BLOCK = 512  # tar's unit, in bytes
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_CONNECTIONS = 32  # a header behind a URL is a request, which mostly waits
_AHEAD = 8192  # bytes

T = TypeVar("T")
R = TypeVar("R")


class Member(NamedTuple):
    """A file in a tar. offset: of its first byte in the whole file."""

    name: str
    offset: int
    size: int


class ReadAhead:
    """storage.read that asks for more, up to the file's end: small members and their headers come at once."""

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
    """The files of the tar between two bytes of a file. Raises SourceError where it is damaged."""
    place, extensions = start, b""
    while True:
        if place + _BLOCK > end:
            raise SourceError(f"{file} is cut short: the tar has no end at byte {end}")
        header = read(file, place, _BLOCK)
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            if extensions and info.type not in _EXTENSIONS:
                # A long name, say, stands before its header: tarfile joins them.
                info = tarfile.TarFile(fileobj=BytesIO(extensions + header)).next() or info
        except tarfile.TarError as error:
            raise SourceError(f"{file} is damaged: no header of a file at byte {place} ({error})") from None
        offset = place + _BLOCK
        if not 0 <= info.size <= end - offset:
            raise SourceError(f"{file} is cut short or damaged: {info.name} at byte {place} goes beyond it")
        place = offset + -(-info.size // _BLOCK) * _BLOCK
        if info.type in _EXTENSIONS:
            extensions += read(file, offset - _BLOCK, place - offset + _BLOCK)
            continue
        extensions = b""
        if info.type in _FILES:
            yield Member(posixpath.normpath(info.name), offset, info.size)
        elif not info.isdir():
            raise SourceError(f"{file} has {info.name} as a link or in pieces at byte {offset}: extract it")


def read_each(place: str, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `read` gives for each, in order: for many at once if the place is behind a URL."""
    with ThreadPoolExecutor(_CONNECTIONS if storage.is_url(place) else 1) as pool:
        yield from pool.map(read, items)


def class_tars(folder: InputFolder, name: str) -> SplitFiles:
    """A tar of class tars."""
    file = folder.locate(name)
    outer = list(members(file, 0, folder.size(name)))
    # Of two members of one name the later counts, as when they are extracted.
    tars = {PurePosixPath(tar.name).stem: tar for tar in outer if tar.name.endswith(".tar")}
    if not tars:
        raise SourceError(f"{file} has no class tars, <class>.tar")
    strays = [f"train/{member.name}" for member in outer if not member.name.endswith(".tar")]
    return SplitFiles(file, list(tars), _images(file, tars), strays)


def _images(file: str, tars: dict[str, Member]) -> Iterator[Labelled]:
    for images in read_each(file, partial(_class_images, file), tars.items()):
        yield from images


def _class_images(file: str, class_tar: tuple[str, Member]) -> list[Labelled]:
    class_id, tar = class_tar
    found = {member.name: member for member in members(file, tar.offset, tar.offset + tar.size)}
    return [Labelled(f"train/{class_id}/{name}", class_id, file, *where) for name, *where in found.values()]


def flat_tar(folder: InputFolder, tar: str, annotations: Annotations) -> SplitFiles:
    """A tar of validation images, whose labels stand elsewhere."""
    file = folder.locate(tar)
    found = {PurePosixPath(member.name).name: member for member in members(file, 0, folder.size(tar))}
    strays = sorted(f"val/{name}" for name in found if not is_image(name))

    def images() -> Iterator[Labelled]:
        for name, class_id in annotations.classes(sorted(filter(is_image, found))).items():
            yield Labelled(f"val/{class_id}/{name}", class_id, file, found[name].offset, found[name].size)

    return SplitFiles(file, [], images(), strays)
