"""Turn an image file into a JPEG for a shard, or reject it with a reason.

Files are judged by their content, never by their name. A file is **rejected** as

    unreadable     it cannot be read
    empty          it has no bytes
    not an image   it is in none of FORMATS, or its header is broken
    too large      its header claims more than MAX_PIXELS; nothing is decoded
    truncated      it ends before the image does
    corrupt        strict decoding fails
    too elongated  its longer side is more than MAX_ASPECT times the shorter

Small images are scaled up, as section 2 of the paper rescales all images. A file is **repaired** if it is

    not a JPEG     it is in another of FORMATS, or holds several images (MPO, GIF), of which the first is used
    not RGB        gray is repeated in three channels, CMYK and palettes are converted, 16 bits are scaled to
                   8, and transparent images are put on white
    rotated        its EXIF data asks for a rotation or reflection; a broken EXIF block is ignored

Files that must stay unchanged cannot be repaired, so `check_image` rejects them for these reasons, except
gray JPEGs, which decoders convert by themselves. It also rejects a file as

    not plain      Pillow can decode it, but not every decoder can (see baseline_jpeg.py)
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
MAX_ASPECT = 20  # largest ratio of the longer side to the shorter
SUBSAMPLING = "4:2:0"
RESAMPLING = Image.Resampling.BILINEAR  # antialiased, as in the DALI graph that resizes `original`
_ORIENTATION = 0x0112  # EXIF tag

Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class RejectedError(Exception):
    """A file cannot be packed; the message is the reason, one of those listed above."""


@dataclass(frozen=True)
class PackedImage:
    """A JPEG for a shard.

    width, height: in pixels. pixels: the decoded image for statistics, or None if it was not decoded.
    repairs: the names of the repairs that were made, as listed above.
    """

    jpeg: bytes
    width: int
    height: int
    pixels: Image.Image | None
    repairs: tuple[str, ...]


def pack_image(
    content: bytes, geometry: Geometry, size: int, quality: int, decode: bool = True
) -> PackedImage:
    """Check, orient, convert, resize and encode one file.

    geometry: `256` resizes the image and crops its central square, `short256` only resizes it, and `original`
    does neither, and keeps the file's own bytes without metadata if it is a baseline RGB JPEG that needs no
    repair. size: the shorter side after resizing, in pixels (256 in section 2 of the paper). quality: JPEG
    quality, 1 to 100. decode: if false, a file whose bytes are kept is accepted by its headers and its last
    two bytes, without being decoded. Raises RejectedError.
    """
    if geometry == "original" and not decode and (packed := _by_header(content, unchanged=False)):
        return packed
    image, repairs = _decode(_open(content))
    if geometry == "original":
        layout = None if repairs else read_layout(content)
        stripped = without_metadata(content, layout) if layout and layout.baseline_rgb else None
        return PackedImage(
            stripped or _encode(image, quality), *image.size, _resize_shorter(image, size), repairs
        )
    image = resize_and_crop(image, geometry, size)
    return PackedImage(_encode(image, quality), *image.size, image, repairs)


def read_image(content: bytes) -> Image.Image:
    """Decode a file to an upright RGB image, as the packer does. Raises RejectedError."""
    return _decode(_open(content))[0]


def resize_and_crop(image: Image.Image, geometry: Geometry, size: int) -> Image.Image:
    """Resize an image to a shorter side of `size` pixels; with geometry `256`, crop its central square."""
    image = _resize_shorter(image, size)
    if geometry == "256":
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return image


def check_image(content: bytes, size: int, decode: bool = True) -> PackedImage:
    """Check a file that is kept byte for byte.

    size, decode: as for `pack_image`; the image is resized only for the statistics. Raises RejectedError.
    """
    if not decode and (packed := _by_header(content, unchanged=True)):
        return packed
    opened = _open(content)
    gray = opened.mode == "L"
    image, repairs = _decode(opened)
    reasons = [repair for repair in repairs if not (gray and repair == "not RGB")]
    if reasons or read_layout(content) is None:
        raise RejectedError(reasons[0] if reasons else "not plain")
    return PackedImage(content, *image.size, _resize_shorter(image, size), ())


def _by_header(content: bytes, unchanged: bool) -> PackedImage | None:
    """Return a file without decoding it, or None if its headers and its end do not suffice to accept it.

    unchanged: whether the file must stay as it is, or is stripped of its metadata.
    """
    layout = read_layout(content) if content.endswith(END) else None
    if layout is None or not (unchanged or layout.baseline_rgb):
        return None
    if layout.metadata:
        image = _open(content)
        if image.format != "JPEG" or _orientation(image) != 1:
            return None
    width, height = layout.width, layout.height
    if width * height > MAX_PIXELS or _is_elongated(width, height):
        return None
    return PackedImage(content if unchanged else without_metadata(content, layout), width, height, None, ())


def _open(content: bytes) -> Image.Image:
    """Open an image by its header, without decoding it. Raises RejectedError."""
    if not content:
        raise RejectedError("empty")
    try:
        with warnings.catch_warnings(action="ignore"):  # they are about metadata, which is dropped
            image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError("too large") from None
    except Exception as error:
        _reraise_system_error(error)
        # A broken header may raise any error in a plugin; UnidentifiedImageError means an unknown format.
        if isinstance(error, UnidentifiedImageError) or not content.startswith(b"\xff\xd8"):
            raise RejectedError("not an image") from None
        raise RejectedError("corrupt") from None
    if image.width * image.height > MAX_PIXELS:
        raise RejectedError("too large")
    return image


def _decode(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode an image to upright RGB; return it with the repairs that were needed. Raises RejectedError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image.load()
    except Exception as error:
        _reraise_system_error(error)
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


def _reraise_system_error(error: Exception) -> None:
    """Raise an error again if it is not about the file: no memory, or a plugin that cannot be loaded."""
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
    """Return the EXIF orientation, 1 (upright) to 8, or 1 if there is none or the EXIF block is broken."""
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
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
    """Encode an image as a baseline JPEG without metadata."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING, comment=b"")
    return buffer.getvalue()
