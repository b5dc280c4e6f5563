"""Convert decoded pixels of any kind to RGB, a few rows at a time, so that no further copy is needed.

An image of 100 million pixels takes 400 MB in most modes of Pillow, and several steps at once would each
need as much.
"""

import numpy as np
from PIL import Image

_ROWS = 1 << 20  # pixels that are converted at once
_BITS, _PHOTOMETRIC, _SUBFILE, _SAMPLE_FORMAT, _DNG_VERSION = 258, 262, 254, 339, 50706  # TIFF tags
_WHITE_IS_ZERO = 0
_UNSIGNED = {1, 4}  # 4: undefined, which writers mean as unsigned


def is_measurement(image: Image.Image) -> bool:
    """Return whether the samples are floats, or signed or 32-bit integers: nothing says which is white."""
    if image.mode == "F":
        return True
    tags = _tags(image)
    return bool(tags) and (image.mode == "I" or not {*_as_tuple(tags.get(_SAMPLE_FORMAT, 1))} <= _UNSIGNED)


def is_preview(image: Image.Image, content: bytes) -> bool:
    """Return whether the first picture of a TIFF is only a preview, as in the RAW files of cameras."""
    tags = _tags(image)
    is_reduced = _as_tuple(tags.get(_SUBFILE, 0))[0] & 1
    return bool(is_reduced) or _DNG_VERSION in tags or (bool(tags) and content[8:10] == b"CR")  # Canon's CR2


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. 16 bits are scaled to 8, and transparent pixels become white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    tags = _tags(image)
    white = 2 ** _as_tuple(tags.get(_BITS, 16))[0] - 1 if image.mode.startswith("I;16") else 65535
    is_inverted = image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    result = Image.new("RGB", image.size)
    rows = max(1, _ROWS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if image.mode.startswith("I"):
            levels = np.clip(np.asarray(strip, np.int64), 0, white)
            levels = (white - levels if is_inverted else levels) * 255 // white
            strip = Image.fromarray(levels.astype(np.uint8))
        elif image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        result.paste(strip.convert("RGB"), (0, top))
    return result


def _tags(image: Image.Image) -> dict:
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _as_tuple(value) -> tuple[int, ...]:
    """Return the values of a tag, which Pillow gives without a tuple if there is only one."""
    return value if isinstance(value, tuple) else (value,)
