"""Recognise, without decoding any pixels, JPEG files that every decoder accepts."""

from itertools import chain
from typing import NamedTuple

from pipeline.jpeg import FRAMES, SCAN, end_of_image, segments

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2


class Layout(NamedTuple):
    """What the segments of a JPEG say.

    width, height: in pixels. baseline_rgb: whether the file is neither progressive nor gray. scan: the end of
    the header of the first scan, in bytes. metadata: start and end, in bytes, of the segments that can be
    removed without changing the image.
    """

    width: int
    height: int
    baseline_rgb: bool
    scan: int
    metadata: tuple[tuple[int, int], ...]


def read_layout(content: bytes) -> Layout | None:
    """Return the layout of a JPEG that every decoder accepts, or None if the file is not one.

    Such a file has a single frame, which is baseline or progressive, gray or YCbCr, with 8-bit samples and
    tables, and nothing between its segments. Pillow tolerates more than DALI and nvJPEG do, and a file that
    they refuse would stop a run.
    """
    frame: tuple[int, int, bool] | None = None
    metadata: list[tuple[int, int]] = []
    for marker, start, end in segments(content):
        segment = content[start + 4 : end]
        if marker == SCAN:
            return Layout(*frame, end, tuple(metadata)) if frame else None
        if marker == 0xDB and any(table >> 4 for table in segment[::65]):  # 16-bit quantisation tables
            return None
        if marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] == b"\0":  # stored as RGB
            return None
        if marker in FRAMES:
            frame = None if frame else _read_frame(marker, segment)
            if frame is None:
                return None
        elif _is_metadata(marker, segment):
            metadata.append((start, end))
    return None


def _read_frame(marker: int, segment: bytes) -> tuple[int, int, bool] | None:
    """Return a frame's width, height, and whether it is baseline RGB, or None if a decoder may refuse it."""
    component_ids = segment[6::3]
    if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or segment[:1] != b"\x08":
        return None
    if len(component_ids) not in (1, 3) or component_ids == b"RGB":
        return None
    height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
    return width, height, marker == _BASELINE and len(component_ids) == 3


def _is_metadata(marker: int, segment: bytes) -> bool:
    """Return whether a segment is a comment, or application data that does not define the colour space."""
    defines_colours = (marker == 0xE0 and segment[:5] == b"JFIF\0") or (
        marker == 0xEE and segment[:5] == b"Adobe"
    )
    return marker == 0xFE or (0xE0 <= marker <= 0xEF and not defines_colours)


def strip_metadata(content: bytes, layout: Layout) -> bytes | None:
    """Return the file without its metadata segments, and without what follows the end of the image.

    Phones append a video or further images there, with metadata of their own. Returns None if the end of the
    image cannot be found.
    """
    end = end_of_image(content, layout.scan)
    if end is None:
        return None
    if not layout.metadata and end == len(content):
        return content
    edges = [0, *chain.from_iterable(layout.metadata), end]
    return b"".join(content[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
