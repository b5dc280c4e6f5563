"""Thousands of JPEGs broken where it hurts, in child processes: no crash, no hang, no unlisted outcome.

test_odd_images.py changes bytes anywhere. Here a file is taken apart into its segments and its scan, and
markers, lengths, tables, frame, EXIF and entropy-coded data are each broken by what they mean. What is
packed must come out of DALI as the picture that Pillow sees, since training reads it there.

A file is a pure function of its number, and one by itself is run again by

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
from tests.trees import ODD

COUNT = 2000
SECONDS = 60  # for one file; most take milliseconds
SIZE = 48  # of the shorter side in pixels
GEOMETRIES = ("original", "256", "in place")


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn() -> list[bytes]:
    """One JPEG of each structure that Pillow writes."""
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
    """Those real odd files that are JPEGs and small enough to decode hundreds of times."""
    contents = (path.read_bytes() for path in sorted((ODD / "files").iterdir()))
    return [content for content in contents if content[:2] == b"\xff\xd8" and len(content) < 60_000]


FILES = {"drawn": drawn, "odd": odd}


class Parts:
    """A JPEG taken apart: segments as [marker, length, content], and all from the first scan's data on."""

    def __init__(self, content: bytes):
        self.segments: list[list] = []
        place = 2
        while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
            marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
            self.segments.append([marker, length, content[place + 4 : place + 2 + length]])
            place += 2 + max(length, 2)
            if marker == 0xDA:
                break
        self.scan = content[place:]

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
    """Some bytes, or single bits of them, of all there are."""
    changed = bytearray(data)
    for place in rng.integers(len(data), size=count) if data else ():
        kind = rng.integers(3)
        value = rng.choice(EDGES) if kind == 0 else rng.integers(256)
        changed[place] = changed[place] ^ (1 << int(rng.integers(8))) if kind == 1 else int(value)
    return bytes(changed)


def any_of(items: list, rng: Rng):
    return items[rng.integers(len(items))] if items else None


def marker(parts: Parts, rng: Rng, _) -> None:
    segment = any_of(parts.segments, rng)
    segment[0] = int(rng.choice([*range(0xC0, 0x100), 0, 1, 0x4F]))


def length(parts: Parts, rng: Rng, _) -> None:
    segment = any_of(parts.segments, rng)
    edges = [0, 1, 2, 3, 0x7FFF, 0xFFFF, segment[1] - 1, segment[1] + 1, segment[1] * 2]
    segment[1] = int(rng.choice(edges)) & 0xFFFF


def tables(parts: Parts, rng: Rng, _) -> None:
    """Quantisation, Huffman and restart interval."""
    if (segment := any_of(parts.of(0xDB, 0xC4, 0xDD), rng)) is not None:
        # The first bytes say which table and how long the codes are.
        head = int(rng.integers(1, 18)) if rng.random() < 0.6 else len(segment[2])
        segment[2] = replaced(segment[2][:head], rng, int(rng.integers(1, 5))) + segment[2][head:]


def frame(parts: Parts, rng: Rng, _) -> None:
    """Precision, height, width, components and their sampling; or which of these the scan has."""
    if (segment := any_of(parts.of(*range(0xC0, 0xC4), 0xDA), rng)) is not None:
        segment[2] = replaced(segment[2], rng, int(rng.integers(1, 3)))


def exif(parts: Parts, rng: Rng, _) -> None:
    """Fields, offsets that lead in circles, orientations that are none; and MPF's, ICC's and Adobe's."""
    if (segment := any_of(parts.of(0xE1, 0xE2, 0xEE), rng)) is not None:
        head = min(len(segment[2]), 120)
        segment[2] = replaced(segment[2][:head], rng, int(rng.integers(1, 9))) + segment[2][head:]


def orientation(parts: Parts, rng: Rng, _) -> None:
    """A block of its own, in either byte order, with any type, count and value, before or behind others."""
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
    """Bits flipped, spans lost or repeated, markers in the midst of it."""
    first, second = sorted(int(place) for place in rng.integers(len(parts.scan) + 1, size=2))
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
    """Segments lost, repeated or swapped."""
    places = rng.integers(len(parts.segments), size=2)
    first, second = (parts.segments[place] for place in places)
    kind = rng.integers(3)
    if kind == 0 and len(parts.segments) > 1:
        del parts.segments[places[0]]
    elif kind == 1:
        parts.segments.insert(int(places[0]), list(second))
    else:
        parts.segments[places[0]], parts.segments[places[1]] = second, first


def splice(parts: Parts, rng: Rng, others: list[bytes]) -> None:
    """A segment, or the scan, of another file."""
    other = Parts(any_of(others, rng))
    if rng.random() < 0.3 or not other.segments:
        parts.scan = other.scan
    else:
        place = int(rng.integers(len(parts.segments)))
        parts.segments[place] = any_of(other.segments, rng)


def junk(parts: Parts, rng: Rng, _) -> None:
    """Bytes that belong to no segment, fill bytes among them."""
    segment = any_of(parts.segments, rng)
    data = b"\xff" * int(rng.integers(1, 9)) if rng.random() < 0.3 else rng.bytes(int(rng.integers(1, 40)))
    segment[2] += data  # behind the length, which stays


def cut(parts: Parts, rng: Rng, _) -> None:
    parts.scan = parts.scan[: rng.integers(len(parts.scan) + 1)]


MUTATIONS = (marker, length, tables, frame, exif, orientation, scan, scan, order, splice, junk, cut)


def mutant(files: list[bytes], number: int) -> tuple[bytes, str]:
    """The file of that number, and how it was made."""
    rng = np.random.default_rng(number)
    which = int(rng.integers(len(files)))
    parts, made = Parts(files[which]), []
    for mutation in rng.choice(MUTATIONS, rng.choice([1, 1, 1, 2, 3])):
        if parts.segments:
            mutation(parts, rng, files)
            made.append(mutation.__name__)
    return parts.content(), f"file {which}, {'+'.join(made)}"


class Dali:
    """The decoder of the training graph, a file at a time."""

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
    """`packed` or `kept`, or the reason against it."""
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
    rows = slice(None, None, 1 + expected.size // 10**6)  # a few of a huge one
    difference = np.abs(decoded[rows].astype(int) - expected[rows]).mean()
    assert difference < 3, f"DALI's picture differs by {difference:.1f} levels from Pillow's"
    return "kept" if packed.jpeg == content else "packed"


def child(kind: str, first: int, last: int) -> None:
    """Print the number of each file before it is packed, then what came of it."""
    files, dali = FILES[kind](), Dali()
    for number in range(first, last):
        content, made = mutant(files, number)
        print(number, made, end="\t", flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # also out of C code
        print(*(outcome(content, geometry, dali) for geometry in GEOMETRIES), sep="\t", flush=True)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FILES)
def test_broken_jpegs_are_packed_or_rejected_for_a_listed_reason(kind):
    if kind == "odd" and not ODD.is_dir():
        pytest.skip("TEST_DATA has no odd images")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-X",
            "faulthandler",
            "-m",
            "tests.pipeline.packing.test_fuzz_images",
            kind,
            "0",
            str(COUNT),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "before the first file"
    assert done.returncode == 0, f"{kind} {last}, ended with {done.returncode}:\n{done.stderr[-4000:]}"
    assert [int(line.split()[0]) for line in lines] == list(range(COUNT))
    counts = Counter(result for line in lines for result in line.split("\t")[1:])
    assert counts.total() == len(GEOMETRIES) * COUNT
    for reason in counts.keys() - {"packed", "kept"}:
        assert re.search(rf"^ {{4}}{reason}  ", images.__doc__, re.M), f"{reason} is not listed"
    assert {"packed", "kept", "truncated", "corrupt"} <= counts.keys(), counts  # else the files are too tame


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
