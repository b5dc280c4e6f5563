"""Shards: plain WebDataset tars with an index, written once.

A sample is `<key>.jpg` and `<key>.cls` (its label in decimal). Beside each tar lies DALI's own
index, and beside each split one array with a row a sample, which is all that this project reads
besides the JPEG bytes themselves.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import naming, read_fully, whole_file
from pipeline.manifest import HEAD_BYTES, DatasetError, Shard, Split
from pipeline.retry import read_patiently

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # place in Split.shards
        ("offset", "<u8"),  # of the JPEG in the tar, in bytes
        ("size", "<u4"),  # of the JPEG, in bytes
        ("label", "<u4"),
        ("width", "<u2"),  # in pixels
        ("height", "<u2"),
    ]
)
_BLOCK = 512  # tar's unit, in bytes
_NPY_HEADER = 4096  # of an index, in bytes, at most
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


class Place(NamedTuple):
    """Where a sample lies in its tar, in bytes."""

    key: str
    jpeg_offset: int
    jpeg_size: int
    label_offset: int
    label_size: int


class Sample(NamedTuple):
    """An image on its way into a shard: JPEG bytes with their label and size in pixels."""

    key: str
    jpeg: bytes
    label: int
    width: int
    height: int


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard | None, np.ndarray]:
    """Write one tar and its DALI index; returns its record and its rows, with `shard` left 0.

    The same samples give the same bytes: ustar headers without time, owner or host. Files get
    their names when they are whole and on the disk. Without samples nothing is written and the
    record is None.
    """
    rows, places, known = [], [], _Known()
    with whole_file(path) as file:
        for key, jpeg, label, width, height in samples:
            text, start = str(label).encode(), known.size + _BLOCK
            image = _member(f"{key}.jpg", jpeg)
            label_start = known.size + len(image) + _BLOCK
            file.write(known.add(image + _member(f"{key}.cls", text)))
            rows.append((0, start, len(jpeg), label, width, height))
            places.append(Place(key, start, len(jpeg), label_start, len(text)))
        if rows:
            file.write(known.add(bytes(-(known.size + 2 * _BLOCK) % tarfile.RECORDSIZE + 2 * _BLOCK)))
    if not rows:
        path.unlink()
        return None, np.empty(0, INDEX_DTYPE)
    with whole_file(path.with_suffix(".idx")) as index:
        index.write(dali_index(places))
    return known.record(path.name, len(rows)), np.array(rows, INDEX_DTYPE)


class _Known:
    """What dataset.json says of a tar, from its bytes in their order."""

    def __init__(self) -> None:
        self.digest, self.head, self.size = sha256(), b"", 0

    def add(self, data: bytes) -> bytes:
        """Take in the next bytes, and return them."""
        self.digest.update(data)
        if len(self.head) < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - len(self.head)]
        self.size += len(data)
        return data

    def record(self, file: str, samples: int) -> Shard:
        return Shard(
            file=file,
            samples=samples,
            bytes=self.size,
            sha256=self.digest.hexdigest(),
            head_sha256=sha256(self.head).hexdigest(),
        )


def _member(name: str, data: bytes) -> bytes:
    """A file as tarfile writes it, in a fifth of the time. name: at most 100 bytes."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % len(data)
    header[148:156] = b" " * 8  # as which the checksum counts itself
    header[148:155] = b"%06o\0" % sum(header)
    return b"".join((header, data, bytes(-len(data) % _BLOCK)))


def describe_shard(root: Path, file: str, samples: int) -> Shard:
    """The record of a tar that somebody else wrote, by reading all of it. Raises OSError, which names it."""
    known = _Known()
    with naming(root / file), open(root / file, "rb") as opened:
        while part := read_fully(opened, 1 << 20):
            known.add(part)
    return known.record(file, samples)


def dali_index(places: Sequence[Place]) -> bytes:
    """The content of a tar's .idx, by which DALI's own reader finds the samples."""
    lines = (
        f"jpg {place.jpeg_offset} {place.jpeg_size} {place.key}.jpg "
        f"cls {place.label_offset} {place.label_size} {place.key}.cls\n"
        for place in places
    )
    return f"v1.2 {len(places)}\n{''.join(lines)}".encode()


def write_index(path: Path, rows: np.ndarray) -> str:
    """Write a split's array of rows; returns the file's sha256."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    with whole_file(path) as file:
        file.write(buffer.getvalue())
    return sha256(buffer.getvalue()).hexdigest()


def read_index(root: Path, split: Split, classes: int) -> np.ndarray:
    """A split's rows, in the order of its shards.

    Raises DatasetError where they do not fit the split, and OSError, which names the file, where it cannot be
    read.
    """
    path = root / split.index
    expected = split.samples * INDEX_DTYPE.itemsize + _NPY_HEADER
    try:
        content = read_patiently(path, expected + 1)  # more is not the index, however large it is
    except FileNotFoundError:
        raise DatasetError(f"the index {path} is missing: copy it again, or pack the dataset again") from None
    if sha256(content).hexdigest() != split.index_sha256:
        raise DatasetError(
            f"the index {path} is not the one that dataset.json was written with: copy the dataset again"
        )
    try:
        rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        fits = _fits(rows, split, classes)
    except (ValueError, OverflowError, MemoryError):
        fits = False
    if not fits:
        raise DatasetError(f"the index {path} disagrees with dataset.json: pack the dataset again")
    return rows


def _fits(rows: np.ndarray, split: Split, classes: int) -> bool:
    samples = [shard.samples for shard in split.shards]
    if rows.dtype != INDEX_DTYPE or rows.shape != (split.samples,) or sum(samples) != split.samples:
        return False
    ends = np.repeat(np.array([shard.bytes for shard in split.shards], np.uint64), samples)
    return bool(
        np.array_equal(rows["shard"], np.repeat(np.arange(len(samples)), samples))
        and rows["size"].min() > 0
        and (rows["offset"] + rows["size"] <= ends).all()
        and rows["label"].max() < classes
    )
