"""Find the files to classify, and turn errors that concern one of them into messages about it."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.packing.sources.litter import litter_in
from pipeline.printable import in_line
from pipeline.retry import is_outage

PICTURES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ogv", ".wmv"}
VIDEOS |= {".flv", ".3gp"}


class InputError(ValueError):
    """An input that cannot be classified; the message names it."""


class Source(NamedTuple):
    """A file to classify. name: its path relative to the given folder, or its file name."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


class Found(NamedTuple):
    """What the inputs contain. others: the number of files of other kinds in folders, which are skipped."""

    sources: list[Source]
    errors: list[InputError]
    others: int


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn any error of the block into an InputError that names the file.

    An outage of the storage concerns all files, so it remains an OSError.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno is not None and is_outage(error):
            raise
        raise InputError(f"{in_line(error.filename or path)}: {error.strerror or error}") from error
    except MemoryError as error:
        raise InputError(f"{in_line(path)}: out of memory") from error
    except Exception as error:  # broken files make decoders raise anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"{in_line(path)}: {type(error).__name__}: {reason}") from error


def find(inputs: Iterable[Path]) -> Found:
    """Find the files to classify.

    Files are taken as given; folders are searched at any depth for the extensions of pictures and videos, and
    links are followed. Litter, such as hidden files and folders, is passed over, as in packing. An input that
    is missing, or a folder that cannot be listed or holds neither pictures nor videos, is an error. Raises
    OSError if the storage is unavailable.
    """
    sources: list[Source] = []
    errors: list[InputError] = []
    others = 0
    for given in inputs:
        try:
            with errors_of(given):
                if not stat.S_ISDIR(given.stat().st_mode):
                    sources.append(Source(given, given.name))
                    continue
                files = sorted(_inside(given, errors))
                found = [path for path in files if _is_candidate(path)]
                sources += [Source(path, str(path.relative_to(given))) for path in found]
                others += len(files) - len(found)
                if not found:
                    raise InputError(f"no pictures or videos in {in_line(given)} (other files: {len(files)})")
        except InputError as error:
            errors.append(error)
    return Found(sources, errors, others)


def _inside(folder: Path, errors: list[InputError]) -> Iterator[Path]:
    """Yield the files at any depth outside litter, and add an error for each folder that cannot be listed."""

    def note(error: OSError) -> None:
        try:
            with errors_of(folder):
                raise error
        except InputError as noted:
            errors.append(noted)

    seen = set()  # folders, as links may form a cycle
    for parent, folders, names in os.walk(folder, onerror=note, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # Of several links to a folder, the first in this order counts.
        folders[:] = sorted(name for name in folders if not litter_in(name))
        yield from (Path(parent, name) for name in names)


def _is_candidate(path: Path) -> bool:
    """Whether a file has the extension of a picture or a video and is not litter, a pipe or a device."""
    if path.suffix.lower() not in PICTURES | VIDEOS or litter_in(path.name):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # reading it reports the reason
