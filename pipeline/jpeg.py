"""Read the segments of a JPEG file, without decoding any pixels (ITU T.81, annex B)."""

import re
from collections.abc import Iterator

START, END = b"\xff\xd8", b"\xff\xd9"
SCAN = 0xDA
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of frame headers (SOF0 to SOF15)
_TABLES = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD}  # markers of segments that may stand between two scans
# In entropy-coded data, zero follows each byte 0xFF, except for restart markers.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")


def segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment, and its start and end as byte offsets.

    Stops after the header of the first scan, or at the first bytes that are not a segment.
    """
    start = 2 if content[:2] == START else len(content)
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # not the marker of a segment
            return
        end = start + 2 + (content[start + 2] << 8 | content[start + 3])
        yield marker, start, end
        if marker == SCAN:
            return
        start = end


def size_offset(content: bytes) -> int | None:
    """Return the byte offset of the image's height and width, which are two big-endian bytes each.

    Returns None if there is no complete frame header before the first scan. Takes two to three microseconds.
    """
    for marker, start, end in segments(content):
        if marker in FRAMES:
            return start + 5 if start + 9 <= min(end, len(content)) else None
    return None


def end_of_image(content: bytes, scan: int) -> int | None:
    """Return the offset of the first byte after the image, or None if its end cannot be found.

    scan: the end of the header of the first scan. It also cannot be found if metadata comes after that.
    """
    while found := _MARKER.search(content, scan):
        marker, length = found[1][0], int.from_bytes(content[found.end() : found.end() + 2])
        if marker == END[1]:
            return found.end()
        if (marker != SCAN and marker not in _TABLES) or length < 2:
            return None
        scan = found.end() + length
    return None
