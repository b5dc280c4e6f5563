"""Turn an image file into a JPEG for a shard, or reject it with a reason.

Files are judged by their content, never by their name. A file is **rejected** as

    unreadable            it cannot be read; one behind a URL is rejected as remote_errors.py says
    empty                 it has no bytes
    not an image          it is in none of FORMATS, or its header is broken
    this build has no …   Pillow was built without a library that the file needs
    unsupported           it is in one of FORMATS, but in a variant that Pillow cannot decode, such as a
                          lossless JPEG
    not a picture         its samples are floats, or signed or 32-bit integers (TIFF, PFM), as those of
                          measurements: nothing says which value is white
    only a preview        it is a TIFF whose first image is marked as a preview, as in RAW files of cameras
    too large             its header claims more than MAX_PIXELS, or MAX_WEBP_PIXELS, and nothing is decoded;
                          or the file has more than MAX_BYTES (pipeline/storage.py), and is not read
    out of memory         decoding it takes more memory than there is
    truncated             it ends before the image does
    corrupt               strict decoding fails
    too elongated         its longer side is more than MAX_ASPECT times the shorter

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from pipeline.jpeg import END, START
from pipeline.manifest import Geometry
from pipeline.packing import png
from pipeline.packing.baseline_jpeg import read_layout, strip_metadata
from pipeline.packing.codecs import FORMATS, why_unreadable
from pipeline.packing.pixels import is_measurement, is_preview, to_rgb

MAX_PIXELS = 100_000_000  # with which no format and no mode takes more than 1.2 GB, besides the file itself
MAX_WEBP_PIXELS = 50_000_000  # as libwebp's decoder and Pillow hold four copies
MAX_ASPECT = 20  # largest ratio of the longer side to the shorter
SUBSAMPLING = "4:2:0"
RESAMPLING = Image.Resampling.BILINEAR  # antialiased, as in the DALI graph that resizes `original`
_ORIENTATION = 0x0112  # EXIF tag
_BROKEN = ("not an image", "truncated", "corrupt")
_SPARE_BYTES = 1 << 26  # a process that cannot allocate these is short of memory, whatever the file is

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
    with _rejecting_errors(content):
        if geometry == "original" and not decode and (packed := _by_header(content, unchanged=False)):
            return packed
        image, repairs = _upright(_loaded(content))
        if geometry == "original":
            layout = None if repairs else read_layout(content)
            kept = strip_metadata(content, layout) if layout and layout.baseline_rgb else None
            return PackedImage(
                kept or _encode(image, quality), *image.size, _resize_shorter(image, size), repairs
            )
        image = resize_and_crop(image, geometry, size)
        return PackedImage(_encode(image, quality), *image.size, image, repairs)


def read_image(content: bytes) -> Image.Image:
    """Decode a file to an upright RGB image, as the packer does. Raises RejectedError."""
    with _rejecting_errors(content):
        return _upright(_loaded(content))[0]


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
    with _rejecting_errors(content):
        if not decode and (packed := _by_header(content, unchanged=True)):
            return packed
        loaded = _loaded(content)
        gray = loaded.mode == "L"
        image, repairs = _upright(loaded)
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
    if not 0 < width * height <= MAX_PIXELS or _is_elongated(width, height):
        return None
    kept = content if unchanged else strip_metadata(content, layout)
    return PackedImage(kept, width, height, None, ()) if kept else None


@contextmanager
def _rejecting_errors(content: bytes, broken: str = "corrupt") -> Iterator[None]:
    """Turn the errors that a file causes in Pillow into RejectedError, with the reason `broken` if no other
    applies. Errors of the process, such as a lack of descriptors, are raised unchanged."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about metadata, which is dropped anyway
            yield
    except RejectedError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RejectedError("too large") from None
    except MemoryError:
        bytearray(_SPARE_BYTES)  # raises MemoryError if the file is not at fault
        raise RejectedError("out of memory") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # no descriptor is free, for example
            raise
        reason = "truncated" if broken == "corrupt" and "truncated" in str(error) else broken
        raise RejectedError(why_unreadable(content, error) or reason) from None


def _loaded(content: bytes) -> Image.Image:
    """Decode a file. Raises RejectedError."""
    try:
        return _load(content)
    except RejectedError as rejection:
        if str(rejection) not in _BROKEN or not content.startswith(png.SIGNATURE):
            raise
    return _load(png.without_ancillary_chunks(content))


def _load(content: bytes) -> Image.Image:
    image = _open(content)
    if is_preview(image, content):
        raise RejectedError("only a preview")
    if is_measurement(image):
        raise RejectedError("not a picture")
    with _rejecting_errors(content):
        image.load()
    return image


def _open(content: bytes) -> Image.Image:
    """Open an image by its header, without decoding it. Raises RejectedError."""
    if not content:
        raise RejectedError("empty")
    # A broken header may raise any error in a plugin; only UnidentifiedImageError is about the format.
    with _rejecting_errors(content, "corrupt" if content.startswith(START) else "not an image"):
        try:
            image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise RejectedError(why_unreadable(content, error) or "not an image") from None
    if image.width * image.height > (MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS):
        raise RejectedError("too large")
    return image


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Convert a decoded image to upright RGB; return it with the repairs that were needed."""
    if _is_elongated(*image.size):
        raise RejectedError("too elongated")
    repairs = []
    if image.format != "JPEG":
        repairs.append("not a JPEG")
    orientation = _orientation(image)
    if image.mode != "RGB" or image.has_transparency_data:
        repairs.append("not RGB")
        image = to_rgb(image)
    if orientation != 1:
        repairs.append("rotated")
        image = image.transpose(_TRANSPOSITIONS[orientation])
    return image, tuple(repairs)


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
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _resize_shorter(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (int(side * size / shorter + 0.5) for side in image.size)  # as DALI rounds
    return image.resize((width, height), RESAMPLING)


def _encode(image: Image.Image, quality: int) -> bytes:
    """Encode an image as a baseline JPEG without metadata."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=SUBSAMPLING, comment=b"")
    return buffer.getvalue()
