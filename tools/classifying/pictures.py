"""Turn image files into the net's input as packing and evaluation do, with Pillow and numpy."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.packing.images import FORMATS, RejectedError, read_image, resize_and_crop
from pipeline.printable import in_line
from pipeline.retry import read_with_retries
from pipeline.spec import NetSpec
from tools.classifying.inputs import InputError, errors_of

# Crop offsets in x and y, as fractions of the free space.
CENTRE = ((0.5, 0.5),)
FIVE = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), *CENTRE)


def read(path: Path) -> Image.Image:
    """Read a picture as the packer does, judging it by content and not by name.

    Raises InputError for a broken picture, and OSError if the storage is unavailable.
    """
    with errors_of(path):
        try:
            return read_image(read_with_retries(path))
        except RejectedError as error:
            more = ""
            if str(error) == "not an image":
                more = f": it is none of {', '.join(FORMATS)}, and its extension is not that of a video"
            raise InputError(f"{in_line(path)}: {error}{more}") from None


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
