"""From a file as found to a JPEG fit for a shard, or to the reason why not.

Files are judged by content, never by name. A file is **rejected** as

    unreadable     the file system does not hand it over
    empty          it has no bytes
    not an image   none of FORMATS, or its header is broken
    too large      its header claims more than MAX_PIXELS; nothing is decoded
    truncated      it ends before the picture does
    corrupt        it does not decode strictly
    too elongated  its longer side is over MAX_ASPECT times the shorter

Small ones are scaled up, as section 2 of the paper scales all. A file is **repaired** and kept if it was

    not a JPEG     another of FORMATS, or several pictures in one file (MPO, GIF): the first is taken
    not RGB        gray is repeated; CMYK and palettes are converted; 16 bits are scaled to 8;
                   what is transparent becomes white
    rotated        EXIF said how to hold it; a broken EXIF block is ignored
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

Geometry = Literal["256", "short256", "original"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 20
SUBSAMPLING = "4:2:0"
RESAMPLING = Image.Resampling.BILINEAR  # antialiased; the filter of the graph that resizes `original`
_ORIENTATION = 0x0112  # EXIF tag

Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class RejectedError(Exception):
    """A file that cannot be packed; its text is the reason, one of the list above."""


@dataclass(frozen=True)
class Packed:
    """A JPEG for a shard. `pixels`: what it shows, for statistics. `repairs`: see above."""

    jpeg: bytes
    width: int
    height: int
    pixels: Image.Image
    repairs: tuple[str, ...]


def pack_image(content: bytes, geometry: Geometry, size: int, quality: int) -> Packed:
    """Check, orient, convert, resize and encode one file.

    size: pixels of the shorter side after resizing (section 2 of the paper: 256). geometry: `256`
    also cuts out the central square, `short256` does not, and `original` keeps the file's own
    bytes if it is a baseline RGB JPEG that needed no repair. quality: of the JPEG, 1 to 100.

    Raises RejectedError.
    """
    if not content:
        raise RejectedError("empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that is dropped anyway
        image, repairs = _decode(content)
    if geometry == "original":
        shown = _resize_shorter(image, size)
        jpeg = content if not repairs and _is_plain_jpeg(content) else _encode(image, quality)
        return Packed(jpeg, *image.size, shown, repairs)
    image = _resize_shorter(image, size)
    if geometry == "256":
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return Packed(_encode(image, quality), *image.size, image, repairs)


def _decode(content: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture in RGB, upright, with the repairs that this took."""
    try:
        image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError("too large") from None
    except Exception as error:
        # A header may break a plugin in any way; only "cannot identify" is about the format.
        if isinstance(error, UnidentifiedImageError) or not content.startswith(b"\xff\xd8"):
            raise RejectedError("not an image") from None
        raise RejectedError("corrupt") from None
    if image.width * image.height > MAX_PIXELS:
        raise RejectedError("too large")
    try:
        image.load()
    except Exception as error:
        raise RejectedError("truncated" if "truncated" in str(error) else "corrupt") from None
    shorter, longer = sorted(image.size)
    if longer > MAX_ASPECT * shorter:
        raise RejectedError("too elongated")

    repairs = []
    if image.format != "JPEG":
        repairs.append("not a JPEG")
    orientation = _orientation(image)
    if image.mode != "RGB" or image.has_transparency_data:
        repairs.append("not RGB")
        image = _to_rgb(image)
    if orientation != 1:
        repairs.append("rotated")
        image = image.transpose(_TRANSPOSITIONS[orientation])
    return image, tuple(repairs)


_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where there is none or the block is broken."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether any decoder takes it: baseline, YCbCr, 8-bit tables, nothing between its segments.

    Pillow forgives more than DALI and nvJPEG do, which would stop a run over such a file.
    """
    place, baseline = 2, False
    while content[place : place + 1] == b"\xff":
        marker = content[place + 1]
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4])
        segment = content[place + 4 : end]
        if marker == 0xDA:  # start of scan
            return baseline
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # no segment starts so
            return False
        if marker == 0xDB and any(table >> 4 for table in segment[::65]):  # quantisation of 16 bits
            return False
        if marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] == b"\0":  # stored as RGB
            return False
        baseline |= marker == 0xC0
        place = end
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _resize_shorter(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (int(side * size / shorter + 0.5) for side in image.size)  # as DALI rounds
    return image.resize((width, height), RESAMPLING)


def _encode(image: Image.Image, quality: int) -> bytes:
    """Baseline JPEG without metadata."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING, comment=b"")
    return buffer.getvalue()
