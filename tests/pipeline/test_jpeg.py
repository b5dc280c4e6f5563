"""Where a JPEG says its size, without decoding it."""

import struct
from io import BytesIO

import pytest
from PIL import Image

from pipeline.jpeg import size_offset


def encoded(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    file = BytesIO()
    Image.new(mode, (width, height)).save(file, "JPEG", **options)
    return file.getvalue()


def size_in(content: bytes) -> tuple[int, int] | None:
    place = size_offset(content)
    return None if place is None else struct.unpack(">HH", content[place : place + 4])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"progressive": True},
        {"icc_profile": b"x" * 200_000},  # several segments before the frame
        {"exif": b"Exif\0\0" + b"\xff\xc0" + b"x" * 60_000},  # with what looks like a frame in it
        {"comment": b"a comment"},
    ],
)
def test_it_is_the_height_and_width_that_the_encoder_was_given(options):
    assert size_in(encoded(123, 45, **options)) == (45, 123)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"GIF89a" * 9, bytes(100), b"\xff" * 9000]
)
def test_what_has_no_frame_has_no_size(content):
    assert size_offset(content) is None


def test_any_beginning_of_a_file_is_read_without_an_error():
    content = encoded(123, 45)
    assert {size_in(content[:length]) for length in range(len(content))} == {None, (45, 123)}


def test_a_frame_behind_the_first_scan_is_not_looked_for():
    content = encoded(123, 45)
    frame = content.index(b"\xff\xc0")
    assert size_offset(content[:frame] + content[content.index(b"\xff\xda") :] + content[frame:]) is None
