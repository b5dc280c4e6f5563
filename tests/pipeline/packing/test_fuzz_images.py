"""Thousands of broken JPEGs, in child processes: no crash, no hang, no outcome that is not documented.

test_odd_images.py changes arbitrary bytes. This test takes a file apart into its segments and its scan, and
breaks markers, lengths, tables, frame, EXIF and entropy-coded data in ways that suit their meaning. DALI must
decode what is packed to the picture that Pillow shows, since training uses DALI.

A file is a pure function of its number. One file is repeated by

    python -m tests.pipeline.packing.test_fuzz_images drawn 123 124
"""

import faulthandler
import re
import struct
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.packing import images
from pipeline.packing.images import RejectedError, check_image, pack_image
from tests.helpers import REPO
from tests.trees import ODD, encode

COUNT = 2000
SECONDS = 60  # for one file; most take milliseconds
SIZE = 48  # of the shorter side in pixels
GEOMETRIES = ("original", "256", "in place")


def drawn() -> list[bytes]:
    """Return a JPEG of each structure that Pillow writes."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 1.5
    exif.get_ifd(0x8769)[0x9003] = "2012:09:30 00:00:00"
    gray, cmyk = picture.convert("L"), picture.convert("CMYK")
    return [
        encode(picture),
        encode(picture, subsampling="4:4:4", quality=98),
        encode(picture, subsampling="4:2:2", optimize=True),
        encode(picture, progressive=True),
        encode(picture, exif=exif),
        encode(picture, exif=exif, icc_profile=b"profile" * 20_000, comment=b"a comment"),
        encode(picture, restart_marker_blocks=2),
        encode(picture, progressive=True, restart_marker_rows=1, exif=exif),
        encode(picture, keep_rgb=True),
        encode(picture.resize((7, 5))),
        encode(gray),
        encode(gray, progressive=True),
        encode(cmyk),
        encode(picture, "MPO", save_all=True, append_images=[picture.rotate(180)]),
    ]


def odd() -> list[bytes]:
    """Return the odd files that are JPEGs and small enough to be decoded hundreds of times."""
    contents = (path.read_bytes() for path in sorted((ODD / "files").iterdir()))
    return [content for content in contents if content[:2] == b"\xff\xd8" and len(content) < 60_000]


FILES = {"drawn": drawn, "odd": odd}


class Parts:
    """The segments of a JPEG, as [marker, length, content], and all data after the first scan's header."""

    def __init__(self, content: bytes):
        self.segments: list[list] = []
        position = 2
        while content[position : position + 1] == b"\xff" and position + 4 <= len(content):
            marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4])
            self.segments.append([marker, length, content[position + 4 : position + 2 + length]])
            position += 2 + max(length, 2)
            if marker == 0xDA:
                break
        self.scan = content[position:]

    def content(self) -> bytes:
        segments = (
            b"\xff" + bytes([marker]) + struct.pack(">H", length) + data
            for marker, length, data in self.segments
        )
        return b"\xff\xd8" + b"".join(segments) + self.scan

    def of(self, *markers: int) -> list[list]:
        return [segment for segment in self.segments if segment[0] in markers]


EDGES = (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 254, 255)
Rng = np.random.Generator


def replaced(data: bytes, rng: Rng, count: int = 1) -> bytes:
    """Return data with `count` random bytes, or single bits of them, changed."""
    changed = bytearray(data)
    for position in rng.integers(len(data), size=count) if data else ():
        kind = rng.integers(3)
        value = rng.choice(EDGES) if kind == 0 else rng.integers(256)
        changed[position] = changed[position] ^ (1 << int(rng.integers(8))) if kind == 1 else int(value)
    return bytes(changed)


def choice_of(items: list, rng: Rng):
    return items[rng.integers(len(items))] if items else None


def marker(parts: Parts, rng: Rng, _) -> None:
    segment = choice_of(parts.segments, rng)
    segment[0] = int(rng.choice([*range(0xC0, 0x100), 0, 1, 0x4F]))


def length(parts: Parts, rng: Rng, _) -> None:
    segment = choice_of(parts.segments, rng)
    edges = [0, 1, 2, 3, 0x7FFF, 0xFFFF, segment[1] - 1, segment[1] + 1, segment[1] * 2]
    segment[1] = int(rng.choice(edges)) & 0xFFFF


def tables(parts: Parts, rng: Rng, _) -> None:
    """Change a quantisation table, a Huffman table or the restart interval."""
    if (segment := choice_of(parts.of(0xDB, 0xC4, 0xDD), rng)) is not None:
        # The first bytes give the number of the table and the lengths of its codes.
        head = int(rng.integers(1, 18)) if rng.random() < 0.6 else len(segment[2])
        segment[2] = replaced(segment[2][:head], rng, int(rng.integers(1, 5))) + segment[2][head:]


def frame(parts: Parts, rng: Rng, _) -> None:
    """Change precision, height, width, components or their sampling; or the components of the scan."""
    if (segment := choice_of(parts.of(*range(0xC0, 0xC4), 0xDA), rng)) is not None:
        segment[2] = replaced(segment[2], rng, int(rng.integers(1, 3)))


def exif(parts: Parts, rng: Rng, _) -> None:
    """Change fields and offsets of EXIF, or bytes of the segments of MPF, ICC and Adobe."""
    if (segment := choice_of(parts.of(0xE1, 0xE2, 0xEE), rng)) is not None:
        head = min(len(segment[2]), 120)
        segment[2] = replaced(segment[2][:head], rng, int(rng.integers(1, 9))) + segment[2][head:]


def orientation(parts: Parts, rng: Rng, _) -> None:
    """Insert an EXIF segment with an orientation of any byte order, type, count and value."""
    order = rng.choice(["<", ">"])
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(
        f"{order}HI", 42, int(rng.choice([8, 8, 8, 0, 10]))
    )
    kind, count, value = (
        int(rng.choice(choice)) for choice in ([3, 3, 3, 4, 1, 9], [1, 1, 1, 0, 2], range(12))
    )
    entry = struct.pack(f"{order}HHI", 0x0112, kind, count)
    entry += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    fields = int(rng.choice([1, 1, 1, 0, 2, 65535]))
    data = b"Exif\0\0" + tiff + struct.pack(f"{order}H", fields) + entry + bytes(4)
    if rng.random() < 0.2:
        data = data[: rng.integers(len(data))]
    parts.segments.insert(int(rng.integers(len(parts.segments) + 1)), [0xE1, len(data) + 2, data])


def scan(parts: Parts, rng: Rng, _) -> None:
    """Flip bits of the scan, remove or repeat a part of it, or insert a marker."""
    first, second = sorted(int(position) for position in rng.integers(len(parts.scan) + 1, size=2))
    span = slice(first, min(second, first + 40))
    before, inside, after = parts.scan[:first], parts.scan[span], parts.scan[span.stop :]
    code = bytes([0xFF, int(rng.choice([0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDC, 0xC0, 0xC4, 0xFE, 0xFF, 0x00]))])
    parts.scan = [
        before + replaced(inside, rng, int(rng.integers(1, 9))) + after,
        before + after,
        before + inside * 3 + after,
        before + code + inside + after,
        before + code + struct.pack(">H", int(rng.integers(6))) + inside + after,
    ][rng.integers(5)]


def order(parts: Parts, rng: Rng, _) -> None:
    """Remove, repeat or swap segments."""
    positions = rng.integers(len(parts.segments), size=2)
    first, second = (parts.segments[position] for position in positions)
    kind = rng.integers(3)
    if kind == 0 and len(parts.segments) > 1:
        del parts.segments[positions[0]]
    elif kind == 1:
        parts.segments.insert(int(positions[0]), list(second))
    else:
        parts.segments[positions[0]], parts.segments[positions[1]] = second, first


def splice(parts: Parts, rng: Rng, others: list[bytes]) -> None:
    """Take a segment, or the scan, from another file."""
    other = Parts(choice_of(others, rng))
    if rng.random() < 0.3 or not other.segments:
        parts.scan = other.scan
    else:
        position = int(rng.integers(len(parts.segments)))
        parts.segments[position] = choice_of(other.segments, rng)


def junk(parts: Parts, rng: Rng, _) -> None:
    """Insert bytes that belong to no segment, which may be fill bytes."""
    segment = choice_of(parts.segments, rng)
    data = b"\xff" * int(rng.integers(1, 9)) if rng.random() < 0.3 else rng.bytes(int(rng.integers(1, 40)))
    segment[2] += data  # while the length stays the same


def cut(parts: Parts, rng: Rng, _) -> None:
    parts.scan = parts.scan[: rng.integers(len(parts.scan) + 1)]


MUTATIONS = (marker, length, tables, frame, exif, orientation, scan, scan, order, splice, junk, cut)


def mutant(files: list[bytes], number: int) -> tuple[bytes, str]:
    """Return the file with this number, and a description of its changes."""
    rng = np.random.default_rng(number)
    which = int(rng.integers(len(files)))
    parts, made = Parts(files[which]), []
    for mutation in rng.choice(MUTATIONS, rng.choice([1, 1, 1, 2, 3])):
        if parts.segments:
            mutation(parts, rng, files)
            made.append(mutation.__name__)
    return parts.content(), f"file {which}, {'+'.join(made)}"


class Dali:
    """The decoder of the training graph, for one file at a time."""

    def __init__(self):
        from nvidia.dali import fn, pipeline_def, types

        from pipeline.graph import Decoding, GraphOptions, _decode

        options = GraphOptions(Decoding(crop=1), batch=1, resize_shorter=None, max_width=1, max_height=1)

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def graph():
            jpeg = fn.external_source(source=lambda: [self.content], dtype=types.UINT8, ndim=1)
            return _decode(jpeg, options)

        self.graph = graph()

    def decode(self, jpeg: bytes) -> np.ndarray:
        self.content = np.frombuffer(jpeg, np.uint8)
        (decoded,) = self.graph.run()
        return np.array(decoded[0])


def outcome(content: bytes, geometry: str, dali: Dali) -> str:
    """Pack a file; return `packed`, `kept` or the reason for its rejection."""
    pack = partial(pack_image, geometry=geometry, size=SIZE, quality=90)
    if geometry == "in place":
        pack = partial(check_image, size=SIZE)
    with suppress(RejectedError):
        pack(content, decode=False)
    try:
        packed = pack(content)
    except RejectedError as rejection:
        return str(rejection)
    with Image.open(BytesIO(packed.jpeg)) as image:
        expected = np.asarray(image.convert("RGB"))
    decoded = dali.decode(packed.jpeg)
    assert expected.shape == (packed.height, packed.width, 3)
    assert decoded.shape == expected.shape, f"DALI sees {decoded.shape} and Pillow {expected.shape}"
    rows = slice(None, None, 1 + expected.size // 10**6)  # only some rows of a huge picture
    difference = np.abs(decoded[rows].astype(int) - expected[rows]).mean()
    assert difference < 3, f"DALI's picture differs by {difference:.1f} levels from Pillow's"
    return "kept" if packed.jpeg == content else "packed"


def child(kind: str, first: int, last: int) -> None:
    """Print the number of each file before it is packed, and then its outcomes."""
    files, dali = FILES[kind](), Dali()
    for number in range(first, last):
        content, made = mutant(files, number)
        print(number, made, end="\t", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # even within C code
        print(*(outcome(content, geometry, dali) for geometry in GEOMETRIES), sep="\t", flush=True)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FILES)
def test_broken_jpegs_are_packed_or_rejected_for_a_documented_reason(kind):
    if kind == "odd" and not ODD.is_dir():
        pytest.skip("TEST_DATA has no odd images")
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler"]
    command += ["-m", "tests.pipeline.packing.test_fuzz_images", kind, "0", str(COUNT)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "before the first file"
    assert done.returncode == 0, f"{kind} {last}, ended with {done.returncode}:\n{done.stderr[-4000:]}"
    assert [int(line.split()[0]) for line in lines] == list(range(COUNT))
    counts = Counter(result for line in lines for result in line.split("\t")[1:])
    assert counts.total() == len(GEOMETRIES) * COUNT
    for reason in counts.keys() - {"packed", "kept"}:
        assert re.search(rf"^ {{4}}{reason}  ", images.__doc__, re.M), f"{reason} is not listed"
    # Otherwise too little is broken.
    assert {"packed", "kept", "truncated", "corrupt"} <= counts.keys(), counts


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
