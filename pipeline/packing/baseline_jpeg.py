"""JPEG files that any decoder takes, by their segments: no pixel is decoded."""

from itertools import chain
from typing import NamedTuple

from pipeline.jpeg import FRAMES, SCAN, segments

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2


class Layout(NamedTuple):
    """width, height: in pixels. metadata: the segments without which the picture is the same."""

    width: int
    height: int
    baseline_rgb: bool  # neither progressive nor gray
    metadata: tuple[tuple[int, int], ...]  # from byte to byte


def read_layout(content: bytes) -> Layout | None:
    """The layout of a JPEG that any decoder takes, or None.

    Such a file has one frame, baseline or progressive, gray or YCbCr, in 8 bits like its tables, and nothing
    between its segments. Pillow forgives more than DALI and nvJPEG do, which would stop a run over it.
    """
    frame: tuple[int, int, bool] | None = None
    metadata: list[tuple[int, int]] = []
    for marker, place, end in segments(content):
        segment = content[place + 4 : end]
        if marker == SCAN:
            return Layout(*frame, tuple(metadata)) if frame else None
        if marker == 0xDB and any(table >> 4 for table in segment[::65]):  # quantisation of 16 bits
            return None
        if marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] == b"\0":  # stored as RGB
            return None
        if marker in FRAMES:
            frame = None if frame else _read_frame(marker, segment)
            if frame is None:
                return None
        elif _is_metadata(marker, segment):
            metadata.append((place, end))
    return None


def _read_frame(marker: int, segment: bytes) -> tuple[int, int, bool] | None:
    """Width, height, and whether it is baseline and RGB."""
    names = segment[6::3]  # of its components
    if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or segment[:1] != b"\x08":
        return None
    if len(names) not in (1, 3) or names == b"RGB":
        return None
    height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
    return width, height, marker == _BASELINE and len(names) == 3


def _is_metadata(marker: int, segment: bytes) -> bool:
    """Comments and application data, but what tells a decoder the colour space."""
    tells_colours = (marker == 0xE0 and segment[:5] == b"JFIF\0") or (
        marker == 0xEE and segment[:5] == b"Adobe"
    )
    return marker == 0xFE or (0xE0 <= marker <= 0xEF and not tells_colours)


def without_metadata(content: bytes, layout: Layout) -> bytes:
    if not layout.metadata:
        return content
    edges = [0, *chain.from_iterable(layout.metadata), len(content)]
    return b"".join(content[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
