"""Write shards, which are plain WebDataset tars, and write and read the index of a split.

A sample is `<key>.jpg` and `<key>.cls` (its label in decimal). Each tar has an .idx file for DALI's own
WebDataset reader, and each split has an index: an array with a row for each sample. Training reads only that
index and the JPEG bytes. Each split also has the checksum of each sample, so that a single sample can be
checked before its whole shard has been read.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import atomic_write, path_in_errors, read_fully
from pipeline.locations import Location, inside
from pipeline.manifest import HEAD_BYTES, DatasetError, Shard, Split
from pipeline.remote_errors import redact
from pipeline.storage import read_start

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # index in Split.shards
        ("offset", "<u8"),  # offset of the JPEG in the tar, in bytes
        ("size", "<u4"),  # size of the JPEG, in bytes
        ("label", "<u4"),
        ("width", "<u2"),  # in pixels
        ("height", "<u2"),
    ]
)
CHECKSUM_BYTES = 8  # of the SHA-256 of a JPEG
_BLOCK = 512  # bytes in a block of a tar
_NPY_HEADER = 4096  # largest size of the header of an .npy file, in bytes
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


class SampleLocation(NamedTuple):
    """Where the files of a sample are in its tar: offsets and sizes in bytes."""

    key: str
    jpeg_offset: int
    jpeg_size: int
    label_offset: int
    label_size: int


class Sample(NamedTuple):
    """A sample to write to a shard. width, height: in pixels."""

    key: str
    jpeg: bytes
    label: int
    width: int
    height: int


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard | None, np.ndarray]:
    """Write a tar and its DALI index; return its record for the manifest and its rows of the split's index.

    The column `shard` of the rows is 0. The same samples give the same bytes: ustar headers without time,
    owner or host. Each file is written atomically. If there are no samples, no file is written and the record
    is None. Raises OSError.
    """
    rows, locations, summary = [], [], _TarSummary()
    with atomic_write(path) as file:
        for key, jpeg, label, width, height in samples:
            text, start = str(label).encode(), summary.size + _BLOCK
            image = _member(f"{key}.jpg", jpeg)
            label_start = summary.size + len(image) + _BLOCK
            file.write(summary.add(image + _member(f"{key}.cls", text)))
            rows.append((0, start, len(jpeg), label, width, height))
            locations.append(SampleLocation(key, start, len(jpeg), label_start, len(text)))
        if rows:
            file.write(summary.add(bytes(-(summary.size + 2 * _BLOCK) % tarfile.RECORDSIZE + 2 * _BLOCK)))
    if not rows:
        path.unlink()
        return None, np.empty(0, INDEX_DTYPE)
    with atomic_write(path.with_suffix(".idx")) as index:
        index.write(dali_index(locations))
    return summary.record(path.name, len(rows)), np.array(rows, INDEX_DTYPE)


class _TarSummary:
    """Computes a tar's record in dataset.json from its bytes, added in order."""

    def __init__(self) -> None:
        self.digest, self.head, self.size = sha256(), b"", 0

    def add(self, data: bytes) -> bytes:
        """Add the next bytes, and return them."""
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
    """Return the bytes of a tar member, as tarfile would, in a fifth of the time. name: at most 100 bytes."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % len(data)
    header[148:156] = b" " * 8  # the checksum counts its own field as spaces
    header[148:155] = b"%06o\0" % sum(header)
    return b"".join((header, data, bytes(-len(data) % _BLOCK)))


def describe_shard(root: Path, file: str, samples: int) -> Shard:
    """Read an existing tar and return its record for the manifest. Raises OSError, which names the file."""
    summary = _TarSummary()
    with path_in_errors(root / file), open(root / file, "rb") as opened:
        while part := read_fully(opened, 1 << 20):
            summary.add(part)
    return summary.record(file, samples)


def dali_index(locations: Sequence[SampleLocation]) -> bytes:
    """Return the content of a tar's .idx file, from which DALI's own WebDataset reader finds the samples."""
    lines = (
        f"jpg {sample.jpeg_offset} {sample.jpeg_size} {sample.key}.jpg "
        f"cls {sample.label_offset} {sample.label_size} {sample.key}.cls\n"
        for sample in locations
    )
    return f"v1.2 {len(locations)}\n{''.join(lines)}".encode()


def checksum(jpeg: bytes | memoryview) -> bytes:
    """Return the checksum of a sample: the first CHECKSUM_BYTES of the SHA-256 of its JPEG."""
    return sha256(jpeg).digest()[:CHECKSUM_BYTES]


def checksum_array(checksums: Iterable[bytes]) -> np.ndarray:
    """Return checksums as an array [samples, CHECKSUM_BYTES] of uint8."""
    return np.frombuffer(b"".join(checksums), np.uint8).reshape(-1, CHECKSUM_BYTES)


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a split's index or checksums atomically, and return the SHA-256 of the file. Raises OSError."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return sha256(buffer.getvalue()).hexdigest()


def read_index(root: Location, split: Split, classes: int) -> np.ndarray:
    """Read a split's index: an array [samples] of INDEX_DTYPE, in the order of the split's shards.

    classes: number of classes of the dataset. Raises DatasetError if the index is missing or disagrees with
    the manifest, and OSError, which names the file, if it cannot be read.
    """
    path = inside(root, split.index)
    rows = _read_array(path, "index", split.index_sha256, split.samples * INDEX_DTYPE.itemsize)
    if rows is None or not _is_consistent(rows, split, classes):
        raise DatasetError(f"the index {redact(path)} disagrees with dataset.json: pack the dataset again")
    return rows


def read_checksums(root: Location, split: Split) -> np.ndarray | None:
    """Read the checksums of a split's samples, or return None if the dataset has none.

    Returns an array [samples, CHECKSUM_BYTES] of uint8, in the order of the index. Raises DatasetError if the
    file is missing or disagrees with the manifest, and OSError, which names the file, if it cannot be read.
    """
    if split.checksums is None:
        return None
    path, shape = inside(root, split.checksums), (split.samples, CHECKSUM_BYTES)
    found = _read_array(path, "checksum file", split.checksums_sha256, split.samples * CHECKSUM_BYTES)
    if found is None or found.dtype != np.uint8 or found.shape != shape:
        raise DatasetError(
            f"the checksum file {redact(path)} disagrees with dataset.json: pack the dataset again"
        )
    return found


def _read_array(path: Location, what: str, digest: str | None, size: int) -> np.ndarray | None:
    """Read an array of at most `size` bytes, or return None if the file is not a valid array."""
    try:
        content = read_start(path, size + _NPY_HEADER + 1)  # of a larger, wrong file, read no more
    except FileNotFoundError:
        raise DatasetError(
            f"the {what} {redact(path)} is missing: copy it again, or pack the dataset again"
        ) from None
    if sha256(content).hexdigest() != digest:
        raise DatasetError(
            f"the {what} {redact(path)} does not match its checksum in dataset.json: copy the dataset again"
        )
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OverflowError, MemoryError):
        return None


def _is_consistent(rows: np.ndarray, split: Split, classes: int) -> bool:
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
