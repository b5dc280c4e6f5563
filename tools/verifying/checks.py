"""Check one shard against dataset.json and the index, down to the byte.

A tar is read once, from its first byte to its last: it is hashed and walked header by header, and each image
is compared with its row of the index and, on request, decoded. After a broken header the walk continues at
the next valid one, so one flipped byte does not hide the rest.
"""

import os
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pipeline.files import path_in_errors, read_fully
from pipeline.manifest import HEAD_BYTES
from pipeline.packing.storage import read
from pipeline.packing.workers import warn
from pipeline.retry import is_outage, with_retries
from pipeline.shards import INDEX_DTYPE, SampleLocation, dali_index
from pipeline.storage import is_accessible
from tools.verifying.findings import Findings, ShardCheck

SAMPLED = 16  # images per shard
_BLOCK = tarfile.BLOCKSIZE


def check_shard(task: ShardCheck) -> Findings:
    """Check one shard and its .idx. This runs in the worker processes.

    If the checksum is wrong, `sampled` decodes every image, which may identify the damaged sample. Raises
    OSError for a failure of the storage or of this process, which is not damage to the shard.
    """
    found, locations, same = _check_tar(task)
    if not same and task.decode == "sampled":
        first = found.problems[0].what
        found, locations, same = _check_tar(replace(task, decode="all"))
        if same:
            found.add(
                task.shard.file,
                f"gave different bytes when read twice (first: {first}; then none): its storage or this "
                "machine's memory cannot be trusted",
            )
    if task.in_place:
        return found
    path = task.root / Path(task.shard.file).with_suffix(".idx")
    index = None
    try:
        index = read(str(path))
    except OSError as error:
        _add_unreadable(found, task, path.name, error)
    if same:  # otherwise the damaged tar explains a difference
        expected = dali_index(locations)
        if index != expected:
            found.index = expected
            if index is not None:
                found.add(path.name, _first_difference(index, expected))
    return found


def _add_unreadable(found: Findings, task: ShardCheck, file: str, error: OSError) -> None:
    if is_outage(error) or not is_accessible(str(task.root)):
        raise error
    missing = isinstance(error, FileNotFoundError)
    found.add(file, "is missing" if missing else f"cannot be read: {error.strerror}")


def _first_difference(index: bytes, expected: bytes) -> str:
    lines = zip_longest(index.split(b"\n"), expected.split(b"\n"), fillvalue=b"(nothing)")
    number, (line, correct) = next((n, pair) for n, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return f"line {number} is {str(line[:80])[1:]}, but for this tar it must be {str(correct)[1:]}"


def _check_tar(task: ShardCheck) -> tuple[Findings, list[SampleLocation], bool]:
    """Return the findings, the samples' locations, and whether the tar has the bytes that were packed."""
    found = Findings()

    def read_tar() -> tuple[list[SampleLocation], bool]:
        nonlocal found
        found = Findings()
        return _read_tar(task, found)

    try:
        locations, same = with_retries(read_tar, warn)
    except OSError as error:
        _add_unreadable(found, task, task.shard.file, error)
        return found, [], False
    return found, locations, same


def _read_tar(task: ShardCheck, found: Findings) -> tuple[list[SampleLocation], bool]:
    shard, samples = task.shard, _Samples(task, found)
    path = task.root / shard.file
    with path_in_errors(path), open(path, "rb") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for metadata in images
        size = os.fstat(opened.fileno()).st_size
        head = sha256(read_fully(opened, HEAD_BYTES)).hexdigest()
        opened.seek(0)
        file = _Hashed(opened)
        if task.in_place:
            for jpeg, row in _indexed(file, task.rows):
                samples.take_indexed(jpeg, row)
        else:
            for member in _members(file, size, shard.file, found):
                samples.take(member)
            samples.finish()
    same = file.digest.hexdigest() == shard.sha256
    if size != shard.bytes:
        found.add(shard.file, f"has {size} bytes, but dataset.json says {shard.bytes}")
    elif not same:
        found.add(shard.file, "its sha256 differs from the one in dataset.json")
    elif head != shard.head_sha256:
        found.add(shard.file, "the sha256 of its first 64 KiB differs from the one in dataset.json")
    if not task.in_place and len(samples.locations) != shard.samples:
        found.add(shard.file, f"has {len(samples.locations)} samples, but dataset.json says {shard.samples}")
    found.rows = np.array(samples.rows, INDEX_DTYPE)
    return samples.locations, same


class _Hashed:
    """A file that is read sequentially and hashed on the way."""

    def __init__(self, file: BinaryIO):
        self._file, self.position, self.digest = file, 0, sha256()

    def read(self, size: int) -> bytes:
        data = read_fully(self._file, size)
        self.position += len(data)
        self.digest.update(data)
        return data


class _Member(NamedTuple):
    name: str
    offset: int  # of its content, in bytes
    content: bytes


def _members(file: _Hashed, size: int, name: str, found: Findings) -> Iterator[_Member]:
    """Yield the valid members of a tar of `size` bytes; anything else in it is damage. Reads to the end."""
    lost = False  # after a broken header, until a valid one follows
    end = None  # where the zeros at the end of the tar begin, once they have begun
    while len(block := file.read(_BLOCK)) == _BLOCK:
        start = file.position - _BLOCK
        if not any(block):
            end = start if end is None else end
            continue
        if end is not None and not lost:
            found.add(name, "zeros where a member's header is expected", end)
        end = None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            sound = 0 <= header.size <= size - file.position
        except tarfile.HeaderError:
            sound = False
        if not sound:
            if not lost:
                found.add(name, "no valid member header", start)
            lost = True
            continue
        lost = False
        content, padding = file.read(header.size), file.read(-header.size % _BLOCK)
        if any(padding):
            found.add(name, "nonzero padding bytes after it", file.position - len(padding), header.name)
        if header.isreg():
            yield _Member(header.name, start + _BLOCK, content)
        else:
            found.add(name, "is not a regular file", start, header.name)
    if end is None:
        found.add(name, "ends without the zeros that end a tar", file.position)


def _indexed(file: _Hashed, rows: np.ndarray | None) -> Iterator[tuple[_Member, np.ndarray]]:
    """Yield the members to which the rows point, with their rows. Reads to the end."""
    for row in () if rows is None else np.sort(rows, order="offset"):
        before = file.read(int(row["offset"]) - file.position)
        name = before[-_BLOCK:][:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
        yield _Member(name, file.position, file.read(int(row["size"]))), row
    while file.read(1 << 20):
        pass


class _Samples:
    """Pairs the members into samples and compares each with its row of the index."""

    def __init__(self, task: ShardCheck, found: Findings):
        self.task, self.found = task, found
        self.locations: list[SampleLocation] = []
        self.rows: list[tuple[int, ...]] = []
        self._jpeg: _Member | None = None  # waits for its label
        self._expected = None if task.rows is None else {int(row["offset"]): row for row in task.rows}
        self._stride = {"all": 1, "sampled": -(-task.shard.samples // SAMPLED), "none": 0}[task.decode]

    def take(self, member: _Member) -> None:
        jpeg, key = self._jpeg, member.name.removesuffix(".cls")
        if member.name.endswith(".jpg"):
            self._unlabelled()
            self._jpeg = member
        elif jpeg is not None and member.name.endswith(".cls") and jpeg.name == f"{key}.jpg":
            self._jpeg = None
            self._sample(key, jpeg, member)
        else:
            self._report("does not follow the .jpg of the same key", member)

    def take_indexed(self, jpeg: _Member, row: np.ndarray) -> None:
        """Take the image of an in-place sample, whose label only the index gives."""
        ordinal = len(self.rows)
        image = self._open(jpeg)
        if image is not None:
            self.rows.append((0, jpeg.offset, len(jpeg.content), int(row["label"]), *image.size))
            self._finish_sample(ordinal, jpeg, image, row)

    def finish(self) -> None:
        self._unlabelled()
        if self._expected:
            first, *others = sorted(self._expected)
            more = f", and {len(others)} more after it" if others else ""
            what = f"the sample that the index has at this offset is missing{more}"
            self.found.add(self.task.shard.file, what, first)

    def _report(self, what: str, member: _Member) -> None:
        self.found.add(self.task.shard.file, what, member.offset, member.name)

    def _unlabelled(self) -> None:
        if self._jpeg is not None:
            self._report("is not followed by its .cls", self._jpeg)

    def _sample(self, key: str, jpeg: _Member, cls: _Member) -> None:
        ordinal = len(self.locations)
        location = SampleLocation(key, jpeg.offset, len(jpeg.content), cls.offset, len(cls.content))
        self.locations.append(location)
        row = None
        if self._expected is not None:
            row = self._expected.pop(jpeg.offset, None)
            if row is None:
                self._report("is not in the index", jpeg)
        label = self._label(cls)
        image = self._open(jpeg)
        if image is None or label is None:
            return
        self.rows.append((0, jpeg.offset, len(jpeg.content), label, *image.size))
        self._finish_sample(ordinal, jpeg, image, row)

    def _finish_sample(self, ordinal: int, jpeg: _Member, image: Image.Image, row: np.ndarray | None) -> None:
        differs = row is not None and self._compare(jpeg, row, self.rows[-1])
        if self._stride and ordinal % self._stride == 0 and not differs:
            self._decode(jpeg, image)

    def _compare(self, jpeg: _Member, row: np.ndarray, found: tuple[int, ...]) -> bool:
        differs = False
        for name, value in zip(("size", "label", "width", "height"), found[2:], strict=True):
            if row[name] != value:
                self._report(f"its {name} is {value}, but the index says {row[name]}", jpeg)
                differs = True
        return differs

    def _open(self, jpeg: _Member) -> Image.Image | None:
        try:
            image = Image.open(BytesIO(jpeg.content), formats=["JPEG"])
        except MemoryError:
            raise
        except Exception:  # damaged bytes may break the decoder in any way
            self._report("is not a JPEG", jpeg)
            return None
        if image.mode != "RGB" and not (self.task.in_place and image.mode == "L"):
            self._report(f"is {image.mode}, not RGB", jpeg)
        return image

    def _decode(self, jpeg: _Member, image: Image.Image) -> None:
        self.found.decoded += 1
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            self._report(f"cannot be decoded: {error}", jpeg)

    def _label(self, cls: _Member) -> int | None:
        text, classes = cls.content, self.task.classes
        if not (text.isdigit() and len(text) < 10):
            self._report(f"is {text[:20].decode('latin-1')!a}, which is not a label", cls)
        elif int(text) >= classes:
            self._report(f"its label is {int(text)}, but there are only {classes} classes", cls)
        else:
            return int(text)
        return None
