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

What has to stay as it is cannot be repaired, so `check_image` rejects it for these reasons, but for gray
JPEGs, which decoders repeat by themselves, and as

    not plain      Pillow takes it, but not any decoder: jpeg.py
"""

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.jpeg import END
from pipeline.manifest import Geometry
from pipeline.packing.baseline_jpeg import read_layout, without_metadata

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
    """A JPEG for a shard. `pixels`: what it shows, for statistics, or None if it was not decoded.
    `repairs`: see above."""

    jpeg: bytes
    width: int
    height: int
    pixels: Image.Image | None
    repairs: tuple[str, ...]


def pack_image(content: bytes, geometry: Geometry, size: int, quality: int, decode: bool = True) -> Packed:
    """Check, orient, convert, resize and encode one file.

    size: pixels of the shorter side after resizing (section 2 of the paper: 256). geometry: `256`
    also cuts out the central square, `short256` does not, and `original` keeps the file's own
    bytes, without metadata, if it is a baseline RGB JPEG that needs no repair. quality: of the JPEG, 1 to
    100. decode: False believes the headers of a file that is kept, if it ends as a JPEG does.

    Raises RejectedError.
    """
    if geometry == "original" and not decode and (packed := _by_header(content, stays=False)):
        return packed
    image, repairs = _decode(_open(content))
    if geometry == "original":
        layout = None if repairs else read_layout(content)
        kept = without_metadata(content, layout) if layout and layout.baseline_rgb else None
        return Packed(kept or _encode(image, quality), *image.size, _resize_shorter(image, size), repairs)
    image = fit(image, geometry, size)
    return Packed(_encode(image, quality), *image.size, image, repairs)


def read_image(content: bytes) -> Image.Image:
    """What a file shows, in RGB and upright, as the packer sees it. Raises RejectedError."""
    return _decode(_open(content))[0]


def fit(image: Image.Image, geometry: Geometry, size: int) -> Image.Image:
    """An image at the size at which crops are cut: its shorter side as given, and square with `256`."""
    image = _resize_shorter(image, size)
    if geometry == "256":
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image


def check_image(content: bytes, size: int, decode: bool = True) -> Packed:
    """The same for a file that stays where it is, byte for byte. Raises RejectedError."""
    if not decode and (packed := _by_header(content, stays=True)):
        return packed
    opened = _open(content)
    gray = opened.mode == "L"
    image, repairs = _decode(opened)
    reasons = [repair for repair in repairs if not (gray and repair == "not RGB")]
    if reasons or read_layout(content) is None:
        raise RejectedError(reasons[0] if reasons else "not plain")
    return Packed(content, *image.size, _resize_shorter(image, size), ())


def _by_header(content: bytes, stays: bool) -> Packed | None:
    """A file that is kept, if its header and its end say that it can be."""
    layout = read_layout(content) if content.endswith(END) else None
    if layout is None or not (stays or layout.baseline_rgb):
        return None
    if layout.metadata:
        image = _open(content)
        if image.format != "JPEG" or _orientation(image) != 1:
            return None
    width, height = layout.width, layout.height
    if width * height > MAX_PIXELS or _is_elongated(width, height):
        return None
    return Packed(content if stays else without_metadata(content, layout), width, height, None, ())


def _open(content: bytes) -> Image.Image:
    """The picture by its header."""
    if not content:
        raise RejectedError("empty")
    try:
        with warnings.catch_warnings(action="ignore"):  # of metadata that is dropped anyway
            image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError("too large") from None
    except Exception as error:
        _reraise_ours(error)
        # A header may break a plugin in any way; only "cannot identify" is about the format.
        if isinstance(error, UnidentifiedImageError) or not content.startswith(b"\xff\xd8"):
            raise RejectedError("not an image") from None
        raise RejectedError("corrupt") from None
    if image.width * image.height > MAX_PIXELS:
        raise RejectedError("too large")
    return image


def _decode(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture in RGB, upright, with the repairs that this took."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
    except Exception as error:
        _reraise_ours(error)
        raise RejectedError("truncated" if "truncated" in str(error) else "corrupt") from None
    if _is_elongated(*image.size):
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


def _reraise_ours(error: Exception) -> None:
    """Raise what is no matter of the file: memory runs out, or a plugin that is needed cannot be loaded."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        raise error


def _is_elongated(*sides: int) -> bool:
    return max(sides) > MAX_ASPECT * min(sides)


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
        with warnings.catch_warnings(action="ignore"):
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


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
