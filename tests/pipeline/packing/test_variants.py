"""Variants of the formats: files that are not pictures, that a build cannot read, or that have extra data."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, WebPImagePlugin, features
from PIL._util import DeferredError

from pipeline.packing import pixels
from pipeline.packing.images import RejectedError, check_image, pack_image, read_image
from pipeline.packing.pixels import to_rgb
from pipeline.packing.shard import versions
from tests.helpers import REPO
from tests.trees import encode

WIDTH, HEIGHT = 32, 24
PICTURE = Image.radial_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")
PLAIN = encode(PICTURE, "JPEG")


def tiff(data: bytes, *, order: str = "<", tags: dict[int, int] | None = None, samples: int = 1) -> bytes:
    """Return a TIFF with one strip. tags: added to those of the layout, or replacing them."""
    given = {258: 8, 259: 1, 262: 1, 277: samples, **(tags or {})}
    directory = 8 + len(data)
    entries = {256: WIDTH, 257: HEIGHT, 273: 8, 278: HEIGHT, 279: len(data), **given}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory)
    end = directory + 2 + 12 * len(entries) + 4
    rows, more = [], b""
    for tag, value in sorted(entries.items()):
        if tag in (258, 339) and samples > 1:
            rows.append(struct.pack(f"{order}HHII", tag, 3, samples, end + len(more)))
            more += struct.pack(f"{order}{samples}H", *[value] * samples)
        else:
            rows.append(struct.pack(f"{order}HHII", tag, 4, 1, value))
    return head + data + struct.pack(f"{order}H", len(rows)) + b"".join(rows) + bytes(4) + more


def ramp(kind: str, low: float, high: float) -> bytes:
    return np.linspace(low, high, WIDTH * HEIGHT).astype(kind).tobytes()


def reason(content: bytes) -> str:
    with pytest.raises(RejectedError) as rejection:
        read_image(content)
    return str(rejection.value)


MEASUREMENTS = {
    "float": tiff(ramp("<f4", 0, 1), tags={258: 32, 339: 3}),
    "float, big-endian": tiff(ramp(">f4", 0, 1), order=">", tags={258: 32, 339: 3}),
    "float, white is zero": tiff(ramp("<f4", 0, 1), tags={258: 32, 339: 3, 262: 0}),
    "int32": tiff(ramp("<i4", 0, 255), tags={258: 32, 339: 2}),
    "uint32": tiff(ramp("<u4", 0, 2**32 - 1), tags={258: 32}),
    "int16": tiff(ramp("<i2", -32768, 32767), tags={258: 16, 339: 2}),
    "int16, big-endian": tiff(ramp(">i2", -32768, 32767), order=">", tags={258: 16, 339: 2}),
    "int8": tiff(ramp("i1", -128, 127), tags={339: 2}),
    "PFM": b"Pf\n32 24\n-1.0\n" + ramp("<f4", 0, 1),
    "PFM, big-endian": b"Pf\n32 24\n1.0\n" + ramp(">f4", 0, 1),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_file_whose_samples_have_no_known_white_is_not_a_picture(name):
    assert reason(MEASUREMENTS[name]) == "not a picture"


@pytest.mark.parametrize(("zero", "mean"), [(1, 255 / 4), (0, 255 * 3 / 4)])
def test_unsigned_samples_of_16_bits_are_scaled_by_their_white(zero, mean):
    content = tiff(ramp("<u2", 0, 65535 / 2), tags={258: 16, 262: zero})
    assert np.asarray(read_image(content)).mean() == pytest.approx(mean, abs=1)


def test_samples_of_12_bits_are_scaled_by_their_white():
    white = tiff(b"\xff" * (WIDTH * HEIGHT * 3 // 2), tags={258: 12})
    assert np.asarray(read_image(white)).min() == 255


GRAY = bytes(WIDTH * HEIGHT)
PREVIEWS = {
    "NewSubfileType": tiff(GRAY, tags={254: 1}),
    "NewSubfileType, big-endian": tiff(GRAY, order=">", tags={254: 1}),
    "preview of several pages": tiff(GRAY, tags={254: 3}),
    "DNG": tiff(GRAY, tags={50706: 0x00000401}),
    "CR2": tiff(b"CR\2\0" + GRAY[4:]),
}


@pytest.mark.parametrize("name", PREVIEWS)
def test_the_preview_of_a_raw_file_is_not_the_picture(name):
    assert reason(PREVIEWS[name]) == "only a preview"


def test_one_page_of_several_is_a_picture():
    assert read_image(tiff(GRAY, tags={254: 2})).size == (WIDTH, HEIGHT)


UNSUPPORTED = {
    "TIFF, compression": tiff(GRAY, tags={259: 34887}),
    "TIFF, three floats": tiff(ramp("<f4", 0, 1) * 3, tags={258: 32, 339: 3, 262: 2}, samples=3),
    "TIFF, colour filter array": tiff(GRAY, tags={262: 32803}),
    "JPEG, lossless": PLAIN.replace(b"\xff\xc0", b"\xff\xc3"),
    "JPEG, 12 bits": PLAIN.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "BMP, embedded PNG": b"BM" + bytes(8) + struct.pack("<4I2H6I", 54, 40, 9, 9, 1, 24, 5, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_intact_file_that_pillow_cannot_decode_is_not_called_broken(name):
    assert reason(UNSUPPORTED[name]) == "unsupported"


@pytest.mark.parametrize("content", [b"BM is how this text begins", b"II*\0", b"MM\0*" + bytes(99)])
def test_a_file_with_only_the_signature_of_a_format_is_not_an_image(content):
    assert reason(content) == "not an image"


def test_a_missing_library_is_named(monkeypatch):
    webp = encode(PICTURE, "WEBP")
    lzw = tiff(zlib.compress(GRAY), tags={259: 8})
    lab = tiff(GRAY * 3, tags={262: 8}, samples=3)
    monkeypatch.setattr(WebPImagePlugin, "SUPPORTED", False)
    monkeypatch.delattr(Image.core, "libtiff_decoder", raising=False)
    monkeypatch.setattr(ImageCms, "core", DeferredError(ImportError("no module", name="PIL._imagingcms")))
    assert reason(webp) == "this build has no WebP"
    assert reason(lzw) == "this build has no libtiff"
    assert reason(lab) == "this build has no LittleCMS"


# Extra data in PNGs.


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


LONG_TEXT = zlib.compress(b"x" * 2_000_000)
CHUNKS = {
    "long compressed text": chunk(b"zTXt", b"key\0\0" + LONG_TEXT),
    "long compressed international text": chunk(b"iTXt", b"key\0\1\0\0\0" + LONG_TEXT),
    "many texts": chunk(b"tEXt", b"key\0" + b"x" * 900_000) * 80,
    "checksum of a text": chunk(b"tEXt", b"key\0text", 0),
    "checksum of a time": chunk(b"tIME", bytes(7), 0),
    "checksum of EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08", 0),
    "checksum of an unknown chunk": chunk(b"prVt", b"data", 0),
    "short size": chunk(b"pHYs", b"\0"),
    "profile of an unknown compression": chunk(b"iCCP", b"name\0\7data"),
    "damaged profile": chunk(b"iCCP", b"name\0\0data"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_broken_ancillary_chunk_is_ignored(name, last):
    content = encode(PICTURE, "PNG")
    offset = len(content) - 12 if last else content.index(b"IDAT") - 4
    content = content[:offset] + CHUNKS[name] + content[offset:]
    np.testing.assert_array_equal(read_image(content), PICTURE)


def test_transparency_and_orientation_survive_a_broken_ancillary_chunk():
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.new("RGB", (8, 4), "red")
    picture.putpixel((0, 0), (0, 0, 255))
    content = encode(picture, "PNG", transparency=(255, 0, 0), exif=exif)
    broken = content[:33] + CHUNKS["checksum of a text"] + content[33:]
    np.testing.assert_array_equal(read_image(broken), read_image(content))
    assert read_image(broken).getpixel((7, 3)) == (0, 0, 255)
    assert read_image(broken).getpixel((0, 0)) == (255, 255, 255)


def test_a_broken_critical_chunk_rejects_the_file():
    content = bytearray(encode(PICTURE, "PNG"))
    content[content.index(b"IDAT") + 20] ^= 1
    assert reason(bytes(content)) in ("corrupt", "truncated")


# Extra data in JPEGs, after the end of the picture.

SECOND = encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", comment=b"where I live")
EXTRAS = {
    "video": b"\0\0\0\x18ftypmp42" + bytes(9999),
    "second picture": SECOND,
    "several": SECOND + b"MotionPhoto_Data" + SECOND,
    "zeros": bytes(500),
    "line": b"\r\n",
    "end once more": b"\xff\xd9",
}


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("settings", [{}, {"restart_marker_blocks": 1}, {"comment": b"a comment"}])
def test_original_keeps_nothing_after_the_picture(settings, name, decode):
    content = encode(PICTURE, "JPEG", **settings)
    expected = encode(PICTURE, "JPEG", **{key: settings[key] for key in settings if key != "comment"})
    assert pack_image(content + EXTRAS[name], "original", 16, 90, decode).jpeg == expected
    assert check_image(content + EXTRAS[name], 16, decode).jpeg == content + EXTRAS[name]  # in place


@pytest.mark.parametrize("decode", [True, False])
def test_original_keeps_no_comment_between_the_scan_and_the_end(decode):
    content = PLAIN[:-2] + b"\xff\xfe\0\x0dwhere I live" + PLAIN[-2:]
    packed = pack_image(content, "original", 16, 90, decode)
    assert b"where" not in packed.jpeg
    np.testing.assert_allclose(read_image(packed.jpeg), read_image(PLAIN), atol=16)


# Memory.


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_strips_give_the_same_pixels_as_the_whole(mode, monkeypatch):
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 65536, (37, 19), np.uint16))
    colours = Image.fromarray(rng.integers(0, 256, (37, 19, 4), np.uint8))
    image = (
        gray if mode == "I;16" else colours.convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
    )
    if mode == "P":
        image.info["transparency"] = 3
    whole = to_rgb(image)
    monkeypatch.setattr(pixels, "_ROWS", 19 * 5)
    np.testing.assert_array_equal(to_rgb(image), whole)


MEASURE = """
import resource, sys
from PIL import Image
from io import BytesIO
from pipeline.packing.images import pack_image
file = BytesIO()
Image.new(sys.argv[1], (4000, 4000)).save(file, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack_image(file.getvalue(), "256", 256, 90)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_conversion_needs_little_memory_besides_the_decoded_image_and_the_result(mode):
    """The picture for the file, of at least two bytes per pixel, is in memory before it is measured."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mode], cwd=REPO, capture_output=True, text=True, check=True
    )
    kilobytes = int(done.stdout)
    assert kilobytes * 1024 < 16e6 * 8 + 40e6


def test_the_libraries_are_among_the_versions_of_a_run(monkeypatch):
    assert versions()["webp"] == features.version("webp")
    monkeypatch.setattr(features, "version", lambda name: "1" if name == "jpg" else None)
    absent = dict.fromkeys(("webp", "libtiff", "littlecms2", "zlib"), "none")
    assert versions().items() >= {"libjpeg": "1", **absent}.items()
