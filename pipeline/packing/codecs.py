"""The libraries that this build of Pillow decodes with, and why it could not read a file that is an image.

Pillow is built without each library that the machine did not have at that time. A file that needs one of
these is sound, and must not be called broken.
"""

import re
from io import BytesIO

from PIL import Image, UnidentifiedImageError, features

from pipeline.jpeg import FRAMES, START, segments

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LIBRARIES = ("webp", "libtiff", "littlecms2", "zlib")  # besides libjpeg, with which shards are also written
_ABSENT = re.compile(r"decoder (\w+) not available|PIL\._(\w+)|_(\w+) C module is not installed")
_NAMES = {"webp": "WebP", "imagingcms": "LittleCMS", "zip": "zlib", "jpeg": "libjpeg"}
# "BM" alone makes no BMP, as a text may begin with it.
_UNSUPPORTED = re.compile(
    r"unknown (pixel mode|data organization)|unsupported (?!BMP header)|not supported|cannot handle", re.I
)
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
    text = str(error)
    absent = _ABSENT.search(text) if isinstance(error, OSError | ImportError) else None
    if absent:
        name = absent[absent.lastindex or 0]
        return f"this build has no {_NAMES.get(name, name)}"
    if isinstance(error, ImportError):
        return f"this build has no {error.name or 'decoder for it'}"
    is_of_unknown_kind = isinstance(error, KeyError) and content[:2] in (b"II", b"MM")  # a TIFF's compression
    if _UNSUPPORTED.search(text) or is_of_unknown_kind or _needs_another_decoder(content):
        return "unsupported"
    return None


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
    """Return whether no file of this kind can be decoded: a JPEG's process, or a TIFF's compression."""
    if content.startswith(START):
        frames = {marker for marker, _, _ in segments(content) if marker in FRAMES}
        return bool(frames) and not frames & _JPEG_FRAMES
    try:
        with Image.open(BytesIO(content), formats=["TIFF"]) as image:
            compression = image.info["compression"]
    except Exception:
        return False
    try:  # a library that cannot write a compression was built without it
        Image.new("1" if "group" in compression else "RGB", (16, 16)).save(
            BytesIO(), "TIFF", compression=compression
        )
    except Exception:
        return True
    return False
