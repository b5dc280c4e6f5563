"""The size of a JPEG is found in its header without decoding."""

import struct

import pytest
from PIL import Image

from pipeline.jpeg import size_offset
from tests.trees import encode


def size_in(content: bytes) -> tuple[int, int] | None:
    offset = size_offset(content)
    return None if offset is None else struct.unpack(">HH", content[offset : offset + 4])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"icc_profile": b"x" * 200_000},  # several segments before the frame
        {"exif": b"Exif\0\0" + b"\xff\xc0" + b"x" * 60_000},  # which resembles a frame
        {"comment": b"a comment"},
    ],
)
def test_the_height_and_width_given_to_the_encoder_are_found(options):
    for mode in ("RGB", "L", "CMYK"):
        assert size_in(encode(Image.new(mode, (123, 45)), **options)) == (45, 123)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"GIF89a" * 9, bytes(100), b"\xff" * 9000]
)
def test_content_without_a_frame_has_no_size(content):
    assert size_offset(content) is None


def test_a_truncated_jpeg_has_its_size_or_none():
    content = encode(Image.new("RGB", (123, 45)))
    assert {size_in(content[:length]) for length in range(len(content))} == {None, (45, 123)}


def test_a_frame_after_the_first_scan_is_ignored():
    content = encode(Image.new("RGB", (123, 45)))
    frame = content.index(b"\xff\xc0")
    assert size_offset(content[:frame] + content[content.index(b"\xff\xda") :] + content[frame:]) is None
