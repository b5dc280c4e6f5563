"""Remove the ancillary chunks of a PNG, which do not affect its pixels."""

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = {b"tRNS", b"eXIf"}  # transparency and orientation


def without_ancillary_chunks(content: bytes) -> bytes:
    """Return a PNG without its ancillary chunks, except transparency and EXIF data that are intact.

    Section 13.1 of the PNG specification lets decoders ignore ancillary chunks that are broken. Pillow
    refuses the whole file for a wrong checksum in one, and for a text that is longer than its limit.
    """
    parts, start = [SIGNATURE], len(SIGNATURE)
    while start < len(content):
        kind = content[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(content[start : start + 4])
        chunk = content[start:end]
        is_critical = kind[:1].isupper() or end > len(content)
        if is_critical or (kind in _KEPT and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])):
            parts.append(chunk)
        start = end
    return b"".join(parts)
