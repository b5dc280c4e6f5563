"""`pack_image` packs, repairs or rejects odd, broken and hostile files."""

import csv
import re
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.jpeg import size_offset
from pipeline.packing import images
from pipeline.packing.images import PackedImage, RejectedError, check_image, pack_image
from tests.trees import ODD, encode

ROWS = list(csv.DictReader((ODD / "MANIFEST.tsv").open(), delimiter="\t")) if ODD.is_dir() else []

# The reasons that the module's docstring lists: for rejecting a file, for repairing it, and for rejecting a
# file that may not be repaired.
REJECTED, REPAIRED, UNFIT = (
    set(re.findall(r"^ {4}(\S+(?: \S+)*) {2}", part, re.M))
    for part in re.split(r"\*\*repaired\*\*|`check_image`", images.__doc__)
)


def test_the_documented_reasons_are_found():
    assert {"empty", "not an image", "too large", "truncated", "corrupt", "too elongated"} <= REJECTED
    assert {"not a JPEG", "not RGB", "rotated"} == REPAIRED
    assert {"not plain"} == UNFIT


def noise(width: int = 64, height: int = 48) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def outcome(content: bytes, geometry: str = "256", size: int = 32) -> PackedImage | str:
    """Return the packed picture, which must be sound, or the reason, which must be documented."""
    try:
        packed = pack_image(content, geometry, size, 90)
    except RejectedError as rejection:
        assert str(rejection) in REJECTED  # noqa: PT017
        return str(rejection)
    jpeg = Image.open(BytesIO(packed.jpeg), formats=["JPEG"])
    jpeg.load()
    assert (jpeg.mode, jpeg.size) == ("RGB", (packed.width, packed.height))
    assert packed.pixels.mode == "RGB"
    assert set(packed.repairs) <= REPAIRED
    assert_the_loader_takes(packed)
    if geometry == "256":
        assert packed.pixels.size == jpeg.size == (size, size)
    assert {name for name, _ in jpeg.applist} <= {"APP0", "APP14"}  # no EXIF, ICC, XMP or comment
    assert "progressive" not in jpeg.info
    return packed


def assert_the_loader_takes(packed: PackedImage) -> None:
    """Check that the header gives the size of the picture, which the loader compares with the index."""
    offset = size_offset(packed.jpeg)
    assert offset is not None
    assert struct.unpack(">HH", packed.jpeg[offset : offset + 4]) == (packed.height, packed.width)


every_odd_file = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])


@pytest.mark.parametrize("geometry", ["256", "original"])
@every_odd_file
def test_odd_files_have_the_outcome_of_their_manifest_and_original_is_baseline(row, geometry):
    content = (ODD / "files" / row["file"]).read_bytes()
    result = outcome(content, geometry, 256)
    if row["expected"].startswith("reject"):
        assert isinstance(result, str)
    elif row["file"] == "strip_1000x1.jpg":  # its manifest allows a documented rule against it
        assert result == "too elongated"
    elif row["expected"].startswith("valid"):
        assert isinstance(result, PackedImage)
    if isinstance(result, PackedImage) and result.jpeg == content:
        assert geometry == "original"
        assert not result.repairs
    if isinstance(result, PackedImage) and geometry == "original":
        assert is_strictly_baseline(result.jpeg)


@every_odd_file
def test_odd_files_that_cannot_be_repaired_are_kept_or_rejected(row):
    content = (ODD / "files" / row["file"]).read_bytes()
    try:
        kept = check_image(content, 256)
    except RejectedError as rejection:
        assert str(rejection) in REJECTED | REPAIRED | UNFIT  # noqa: PT017
        return
    assert not row["expected"].startswith("reject")
    assert kept.jpeg is content
    assert_the_loader_takes(kept)
    np.testing.assert_allclose(by_dali(content), Image.open(BytesIO(content)).convert("RGB"), atol=2)


def by_dali(jpeg: bytes) -> np.ndarray:
    """Return the picture that the loader's decoder gives, [h,w,3]."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():
        content = fn.external_source(source=lambda: [np.frombuffer(jpeg, np.uint8)], batch=True)
        return fn.decoders.image(content, output_type=types.RGB, adjust_orientation=False)

    pipeline = graph()
    pipeline.build()
    return np.asarray(pipeline.run()[0][0], int)


def is_strictly_baseline(jpeg: bytes) -> bool:
    """Return whether SOF0 is the only frame and only segments and fill bytes precede the scan."""
    offset, frames = 2, []
    while jpeg[offset] == 0xFF:
        marker = jpeg[offset + 1]
        if marker == 0xDA:
            return frames == [0xC0]
        if marker == 0xFF:
            offset += 1
            continue
        if marker < 0xC0:
            return False
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frames.append(marker)
        offset += 2 + int.from_bytes(jpeg[offset + 2 : offset + 4], "big")
    return False


def test_content_that_is_not_an_accepted_image_is_rejected():
    assert outcome(b"") == "empty"
    for content in (b"\0", b"hello", b"<html></html>" * 99, bytes(10_000), b"\x89PNG\r\n\x1a\n"):
        assert outcome(content) == "not an image"
    icon = encode(noise(16, 16), "ICO")  # a format that Pillow reads but the packer does not accept
    assert outcome(icon) == "not an image"


def test_exceptions_of_pillows_plugins_are_handled():
    """Pillow's plugins also raise ValueError and SyntaxError."""
    assert outcome(b"P6 sixty 48 255 ") == "not an image"  # ValueError in opening
    assert outcome(b"P3 2 2 255 1 2 3 four 5 6") == "corrupt"  # ValueError in decoding
    exif = b"Exif\0\0neither of the byte orders"  # SyntaxError in reading the orientation
    assert isinstance(outcome(encode(noise(), "JPEG", exif=exif, dpi=(72, 72))), PackedImage)


def test_a_marker_without_a_length_does_not_lead_past_the_end():
    plain = encode(noise(), "JPEG")
    restart = plain[:2] + b"\xff\xd0" + plain[2:]  # without a length; 0xffe0 follows
    hostile = restart.ljust(4 + 0xFFE0, b"\0") + b"\xff"  # where that would lead as a length
    result = outcome(hostile, "original")
    assert isinstance(result, PackedImage)
    assert is_strictly_baseline(result.jpeg)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_rejected(progressive, part):
    content = encode(noise(), "JPEG", progressive=progressive)
    for geometry in ("256", "original"):
        assert outcome(content[: int(len(content) * part)], geometry) in ("truncated", "corrupt")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_truncated_formats_are_rejected(kind):
    content = encode(noise(), kind)
    assert isinstance(outcome(content), PackedImage)
    assert outcome(content[: len(content) // 2]) in REJECTED


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def gif_of(width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\xf0\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\x02\x02D\x01\0;"


def jpeg_of(width: int, height: int) -> bytes:
    content = encode(noise(), "JPEG")
    return content.replace(struct.pack(">HH", 48, 64), struct.pack(">HH", height, width))


@pytest.mark.parametrize("size", [(30_000, 30_000), (60_000, 3_000), (10_001, 10_000)])
@pytest.mark.parametrize("claim", [png_of, gif_of, jpeg_of])
def test_huge_images_are_rejected_before_memory_is_allocated(claim, size, monkeypatch):
    assert outcome(claim(64, 48)) != "too large"
    content = claim(*size)

    def allocate(*_):
        pytest.fail("memory was asked for")  # which no handler of Exception catches

    for name in ("new", "fill"):
        monkeypatch.setattr(Image.core, name, allocate)
    assert outcome(content) == "too large"


def test_an_image_of_exactly_the_limit_is_not_too_large():
    assert images.MAX_PIXELS == 10_000**2
    assert outcome(png_of(10_000, 10_000)) in ("truncated", "corrupt")


def seeds() -> list[bytes]:
    """Return a small file of each format, with metadata."""
    picture, exif = noise(24, 16), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 1.5
    settings = {"exif": exif, "icc_profile": b"profile" * 9, "comment": b"comment"}
    jpegs = [
        encode(picture, "JPEG", **settings),
        encode(picture, "JPEG", progressive=True),
        encode(picture.convert("L"), "JPEG", restart_marker_blocks=1),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "MPO", save_all=True, append_images=[picture]),
    ]
    return jpegs + [encode(picture, kind) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]


EDITS = st.tuples(
    st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=16)
)


@settings(max_examples=300)
@given(content=st.sampled_from(seeds()), edits=st.lists(EDITS, min_size=1, max_size=6))
def test_damaged_files_are_packed_or_rejected(content, edits):
    for kind, where, data in edits:
        offset = int(where * len(content))
        before, after = content[:offset], content[offset:]
        content = {
            "set": before + data[:1] + after[1:],
            "cut": before + after[len(data) :],
            "insert": before + data + after,
            "end": before,
        }[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10**6)  # so that broken sizes do not cost memory
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
        for geometry in ("original", "256"):
            assert isinstance(outcome(content, geometry, 16), PackedImage | str)  # otherwise outcome fails
