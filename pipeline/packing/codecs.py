"""The libraries that this build of Pillow decodes with, and why it could not read a file that is an image.

Pillow is built without each library that the machine did not have at that time. A file that needs one of
them is intact, and must not be reported as broken.
"""

import re
from io import BytesIO

from PIL import Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

from pipeline.jpeg import FRAMES, START, segments

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LIBRARIES = ("webp", "libtiff", "littlecms2", "zlib")  # besides libjpeg, with which shards are also written
_ABSENT = re.compile(r"decoder (\w+) not available|PIL\._(\w+)|_(\w+) C module is not installed")
_NAMES = {"webp": "WebP", "imagingcms": "LittleCMS", "zip": "zlib", "jpeg": "libjpeg"}
# A file that merely begins with "BM" may be a text, not a BMP.
_UNSUPPORTED = re.compile(
    r"unknown (pixel mode|data organization)|unsupported (?!BMP header)|not supported|cannot handle", re.I
)
_COMPRESSION = 259  # TIFF tag
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # the others are lossless or hierarchical


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine which files can be read, and as what."""
    libraries = {name: features.version(name) or "none" for name in _LIBRARIES}
    return {"libjpeg": features.version("libjpeg_turbo") or features.version("jpg") or "none", **libraries}


def why_unreadable(content: bytes, error: Exception) -> str | None:
    """Return the reason if Pillow cannot read an image although nothing is wrong with it, else None.

    content: the file. error: the one that opening or decoding it raised.
    """
    if isinstance(error, UnidentifiedImageError):
        error = _error_of_plugin(content) or error
    text = f"{error} {getattr(error, 'name', '')}"
    absent = _ABSENT.search(text) if isinstance(error, OSError | ImportError) else None
    if absent:
        library = absent[absent.lastindex or 0]
        return f"this build has no {_NAMES.get(library, library)}"
    if isinstance(error, ImportError):
        return f"this build has no {error.name or 'decoder'}"
    return "unsupported" if _UNSUPPORTED.search(text) or _needs_another_decoder(content) else None


def _error_of_plugin(content: bytes) -> Exception | None:
    """Return the error that Image.open hides when the plugin of the file's format cannot read it."""
    for name in FORMATS:
        plugin, accepts = Image.OPEN[name]
        accepted = accepts(content[:16]) if accepts else False
        if isinstance(accepted, str):  # only WebP's plugin can be without its library
            return ImportError(name=_NAMES["webp"])
        if accepted:
            try:
                plugin(BytesIO(content), "")
            except Exception as error:
                return error
    return None


def _needs_another_decoder(content: bytes) -> bool:
    """Return whether Pillow has no decoder for the process of this JPEG or the compression of this TIFF."""
    if content.startswith(START):
        frames = {marker for marker, _, _ in segments(content) if marker in FRAMES}
        return bool(frames) and not frames & _JPEG_FRAMES
    header = content[: 16 if content[2:4] in (b"+\0", b"\0+") else 8]  # of BigTIFF or TIFF
    try:
        tags, file = ImageFileDirectory_v2(header), BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        compression = COMPRESSION_INFO.get(tags.get(_COMPRESSION, 1))
    except Exception:  # it is not a TIFF, or it is broken
        return False
    if compression is None:
        return True
    try:  # a libtiff that cannot write a compression was built without it
        mode = "1" if "group" in compression or "ccitt" in compression else "RGB"
        Image.new(mode, (16, 16)).save(BytesIO(), "TIFF", compression=compression)
    except Exception:
        return True
    return False
