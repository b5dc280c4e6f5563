"""Find out whether a video file ends before its own headers say that it does.

Matroska, MP4 and AVI files are sequences of elements that begin with their length. Timestamps cannot reveal a
truncated file: the sound may be longer than the pictures, and the last picture may be shown for any time.
"""

import os
from typing import BinaryIO

_BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"sidx", b"meta", b"udta", b"uuid"}
_BOXES |= {b"free", b"skip", b"wide", b"pnot", b"pdin", b"prft", b"emsg"}
_ELEMENTS = {b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"}  # Matroska's header and segment


def missing_bytes(file: BinaryIO) -> int:
    """Return the number of bytes missing at the end of a video; 0 if it is whole or its format does not say.

    Rewinds the file. Raises OSError.
    """
    if not file.seekable():
        return 0
    size, end = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    while end < size and (length := _length(file.read(16))):
        end += length
        file.seek(min(end, size))
    file.seek(0)
    return max(0, end - size)


def _length(head: bytes) -> int | None:
    """Return the number of bytes of the element that begins with `head`, or None if it is unknown."""
    if head[:4] == b"RIFF":
        content = int.from_bytes(head[4:8], "little")
        return 8 + content if content else None  # 0 in a recording that was interrupted
    if head[:4] in _ELEMENTS and len(head) == 16 and head[4]:
        width = 9 - head[4].bit_length()  # number of bytes of the length, which its first set bit gives
        unknown = (1 << 7 * width) - 1
        content = int.from_bytes(head[4 : 4 + width], "big") & unknown
        return 4 + width + content if content != unknown else None
    if head[4:8] in _BOXES:
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:], "big") if length == 1 else length
        return length if length >= 8 else None  # 0 stands for the rest of the file
    return None
