"""Shards: plain WebDataset tars with an index, written once and read by memory map.

A sample is `<key>.jpg` and `<key>.cls` (its label in decimal). Beside each tar lies DALI's own
index, and beside each split one array with a row a sample, which is all that this project reads
besides the JPEG bytes themselves.
"""

import io
import mmap
import os
import resource
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import whole_file
from pipeline.manifest import HEAD_BYTES, DatasetError, Manifest, Shard, Split

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
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
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
    """The record of a tar that somebody else wrote, by reading all of it."""
    known = _Known()
    with open(root / file, "rb") as opened:
        while part := opened.read(1 << 20):
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
    """A split's rows, in the order of its shards. Raises DatasetError where they do not fit the split."""
    path = root / split.index
    expected = split.samples * INDEX_DTYPE.itemsize + _NPY_HEADER
    try:
        with open(path, "rb") as file:
            content = file.read(expected + 1)  # more is not the index, however large it is
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
        and (rows["offset"] + rows["size"] <= ends).all()
        and rows["label"].max() < classes
    )


class ShardReader:
    """A split's samples by number, as views of its mapped tars.

    rows: [samples] of INDEX_DTYPE. Opening checks that each file is there, as long as packed, and
    begins with the bytes that were packed; it raises DatasetError that names the first that is
    not. Whole-file checksums are a matter for a verifying tool: they would read everything.
    """

    def __init__(self, root: Path, manifest: Manifest, split: str):
        self.root = root
        self.split = manifest.split(split)
        self.rows = read_index(root, self.split, len(manifest.classes))
        _allow_open_files(len(self.split.shards))
        self._files = [_map_shard(root / shard.file, shard) for shard in self.split.shards]
        self._maps = [np.frombuffer(file, np.uint8) for file in self._files]

    def __len__(self) -> int:
        return len(self.rows)

    def jpeg(self, number: int) -> np.ndarray:
        """The file bytes of sample `number` as a read-only uint8 view: nothing is copied."""
        return self.jpegs(np.array([number]))[0]

    def jpegs(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The same for many samples, at a microsecond each."""
        rows = self.rows[numbers].tolist()
        return [self._maps[shard][offset : offset + size] for shard, offset, size, *_ in rows]

    def will_need(self, numbers: np.ndarray) -> None:
        """Have the kernel fetch what of these samples is not in memory, without waiting for it."""
        for shard, offset, size, *_ in self.rows[np.sort(numbers)].tolist():  # in the order of the disk
            before = offset % mmap.PAGESIZE
            self._files[shard].madvise(mmap.MADV_WILLNEED, offset - before, size + before)

    @property
    def stays_in_memory(self) -> bool:
        """Whether the split, once read, can be expected to stay in the page cache."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError, ValueError):  # where there is no limit
            memory = min(memory, int(_CGROUP_LIMIT.read_text()))
        return 2 * sum(shard.bytes for shard in self.split.shards) < memory

    def key(self, number: int) -> str:
        """The sample's key, from its header in the tar. Raises DatasetError where that is damaged."""
        shard, offset, *_ = self.rows[number].tolist()
        block = self._maps[shard][offset - _BLOCK : offset].tobytes()
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise DatasetError(f"no tar header before {self.name(number)}: copy the shard again") from None
        folder, slash, name = header.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    def name(self, number: int) -> str:
        """Where a sample lies, for messages."""
        row = self.rows[number]
        return f"{self.root / self.split.shards[row['shard']].file} at byte {row['offset']}"


def _map_shard(path: Path, shard: Shard) -> mmap.mmap:
    """The whole file. A tar cut short would kill the process later, so it is checked."""
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != shard.bytes:
                raise DatasetError(
                    f"the shard {path} has {actual} bytes and dataset.json says {shard.bytes}: copy it again"
                )
            if sha256(file.read(HEAD_BYTES)).hexdigest() != shard.head_sha256:
                raise DatasetError(f"the shard {path} was replaced since it was packed: copy it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DatasetError(f"the shard {path} is missing: copy it again, or pack the dataset again") from None


def _allow_open_files(count: int) -> None:
    """Each map holds a file open; the usual soft limit of 1024 is fewer than large sets have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
