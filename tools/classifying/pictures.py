"""Turning image files into the net's input as packing and evaluation do, with Pillow and numpy."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.packing.images import FORMATS, RejectedError, read_image, resize_and_crop
from pipeline.retry import is_outage, read_with_retries
from pipeline.spec import NetSpec

PICTURES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ogv", ".wmv"}
VIDEOS |= {".flv", ".3gp"}
# Crop offsets in x and y, as fractions of the free space.
CENTRE = ((0.5, 0.5),)
FIVE = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), *CENTRE)


class InputError(ValueError):
    """An input that cannot be classified; the message names it."""


class Source(NamedTuple):
    """A file to classify. name: its path relative to the given folder, or its file name."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find(inputs: Iterable[Path]) -> tuple[list[Source], int]:
    """Return the files to classify, and the number of files in folders that were skipped.

    Files are taken as given; folders are searched at any depth for the extensions of pictures and videos.
    Raises InputError if there is nothing to classify, and OSError if a folder cannot be listed.
    """
    sources: list[Source] = []
    others = 0
    for given in inputs:
        if given.is_dir():
            files = sorted(path for path in _inside(given) if path.is_file())
            found = [path for path in files if path.suffix.lower() in PICTURES | VIDEOS]
            if not found:
                raise InputError(f"no pictures or videos in {given} (other files: {len(files)})")
            sources += [Source(path, str(path.relative_to(given))) for path in found]
            others += len(files) - len(found)
        elif given.exists():
            sources.append(Source(given, given.name))
        else:
            raise InputError(f"{given} does not exist")
    return sources, others


def _inside(folder: Path) -> Iterator[Path]:
    """Yield all files at any depth. Raises OSError for a folder that cannot be listed, unlike `rglob`."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def read(path: Path) -> Image.Image:
    """Read a picture as the packer does, judging it by content and not by name.

    Raises InputError for a broken picture, and OSError if the storage is unavailable.
    """
    try:
        return read_image(read_with_retries(path))
    except OSError as error:
        if is_outage(error):
            raise
        raise InputError(f"{path}: {error.strerror}") from None
    except RejectedError as error:
        more = ""
        if str(error) == "not an image":
            more = f": it is none of {', '.join(FORMATS)}, and its extension is not that of a video"
        raise InputError(f"{path}: {error}{more}") from None


def views(image: Image.Image, spec: NetSpec, crops: int) -> np.ndarray:
    """Return a picture's crops as [crops,3,crop,crop] fp32, minus the mean.

    One crop is the centre; ten are the corners and the centre with their mirror images.
    """
    resized = resize_and_crop(image, spec.geometry, spec.size)
    pixels = np.asarray(resized, np.float32) - np.array(spec.mean, np.float32)
    cut = [_cut(pixels, x, y, spec.crop) for x, y in (FIVE if crops == 10 else CENTRE)]
    if crops == 10:
        cut += [view[:, ::-1] for view in cut]
    return np.ascontiguousarray(np.stack(cut).transpose(0, 3, 1, 2))


def _cut(pixels: np.ndarray, x: float, y: float, crop: int) -> np.ndarray:
    """Cut a square out of [h,w,3], rounding its offset to the same pixel as DALI."""
    height, width, _ = pixels.shape
    top, left = int(y * (height - crop) + 0.5), int(x * (width - crop) + 0.5)
    return pixels[top : top + crop, left : left + crop]
