"""From files to what a net takes: what the packer and the evaluation do, by Pillow and numpy."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.packing.images import FORMATS, RejectedError, fit, read_image
from pipeline.retry import is_outage, read_patiently
from pipeline.spec import NetSpec

PICTURES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ogv", ".wmv"}
VIDEOS |= {".flv", ".3gp"}
CENTRE = ((0.5, 0.5),)
FIVE = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), *CENTRE)  # of the room that a crop has, in x and y


class InputError(ValueError):
    """Input that cannot be classified; the message names it."""


class Source(NamedTuple):
    """A file. name: below the folder that was given, or alone."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find(inputs: Iterable[Path]) -> tuple[list[Source], int]:
    """Files as they were given and, in folders, at any depth, all that are named like a picture or a video;
    and how many others there are in those. Raises InputError where there is nothing to classify, and OSError
    where a folder cannot be listed."""
    sources: list[Source] = []
    others = 0
    for given in inputs:
        if given.is_dir():
            files = sorted(path for path in _inside(given) if path.is_file())
            found = [path for path in files if path.suffix.lower() in PICTURES | VIDEOS]
            if not found:
                raise InputError(f"no pictures or videos in {given}, and {len(files)} other files")
            sources += [Source(path, str(path.relative_to(given))) for path in found]
            others += len(files) - len(found)
        elif given.exists():
            sources.append(Source(given, given.name))
        else:
            raise InputError(f"{given} does not exist")
    return sources, others


def _inside(folder: Path) -> Iterator[Path]:
    """All files at any depth. Raises OSError, where `rglob` would pass over what it cannot list."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(parent, name) for name in names)


def read(path: Path) -> Image.Image:
    """A picture as the packer would see it, by content, whatever the name.

    Raises InputError, and OSError in an outage of the storage, which is not the picture's fault.
    """
    try:
        return read_image(read_patiently(path))
    except OSError as error:
        if is_outage(error):
            raise
        raise InputError(f"{path}: {error.strerror}") from None
    except RejectedError as error:
        more = ""
        if str(error) == "not an image":
            more = f": neither one of {', '.join(FORMATS)} nor, by its name, a video"
        raise InputError(f"{path}: {error}{more}") from None


def views(image: Image.Image, spec: NetSpec, crops: int) -> np.ndarray:
    """The centre of a picture, or with ten crops corners and centre and their mirror images:
    [crops,3,crop,crop] in fp32, minus the mean."""
    pixels = np.asarray(fit(image, spec.geometry, spec.size), np.float32) - np.array(spec.mean, np.float32)
    cut = [_cut(pixels, x, y, spec.crop) for x, y in (FIVE if crops == 10 else CENTRE)]
    if crops == 10:
        cut += [view[:, ::-1] for view in cut]
    return np.ascontiguousarray(np.stack(cut).transpose(0, 3, 1, 2))


def _cut(pixels: np.ndarray, x: float, y: float, crop: int) -> np.ndarray:
    """A square of [h,w,3], at the pixel to which DALI rounds too."""
    height, width, _ = pixels.shape
    top, left = int(y * (height - crop) + 0.5), int(x * (width - crop) + 0.5)
    return pixels[top : top + crop, left : left + crop]
