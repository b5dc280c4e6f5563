"""Check one shard against dataset.json and the index, down to the byte.

A tar is read once, from its first byte to its last: it is hashed and walked header by header, and each image
is compared with its row of the index and, on request, decoded. After a broken header the walk continues at
the next valid one, so one flipped byte does not hide the rest.
"""

import os
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.files import path_in_errors, read_fully
from pipeline.locations import Location, inside
from pipeline.manifest import HEAD_BYTES, MANIFEST_NAME
from pipeline.packing.storage import read
from pipeline.packing.workers import warn
from pipeline.retry import StorageError, is_outage, with_retries
from pipeline.shards import INDEX_DTYPE, SampleLocation, checksum_array, dali_index
from pipeline.storage import is_accessible
from tools.verifying import remote
from tools.verifying.findings import Findings, ShardCheck
from tools.verifying.remote import RemoteFile
from tools.verifying.samples import Member, Samples

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
    name = str(Path(task.shard.file).with_suffix(".idx"))
    index = None
    try:
        index = read(str(inside(task.root, name)))
    except OSError as error:
        _add_unreadable(found, task, name, error)
    if same:  # otherwise the damaged tar explains a difference
        expected = dali_index(locations)
        if index != expected:
            found.index = expected
            if index is not None:
                found.add(name, _first_difference(index, expected))
    return found


def _add_unreadable(found: Findings, task: ShardCheck, file: str, error: OSError) -> None:
    place = task.root if isinstance(task.root, Path) else inside(task.root, MANIFEST_NAME)
    if is_outage(error) or not is_accessible(str(place)):
        raise error
    if isinstance(error, FileNotFoundError):
        found.add(file, "is missing")
    else:
        reason = error.reason if isinstance(error, StorageError) else error.strerror
        found.add(file, f"cannot be read: {reason}")


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
        is_remote = isinstance(task.root, str)  # then each request is repeated, and not the whole shard
        locations, same = read_tar() if is_remote else with_retries(read_tar, warn)
    except OSError as error:
        _add_unreadable(found, task, task.shard.file, error)
        return found, [], False
    return found, locations, same


def _read_tar(task: ShardCheck, found: Findings) -> tuple[list[SampleLocation], bool]:
    shard, samples = task.shard, Samples(task, found)
    with _opened(inside(task.root, shard.file)) as (opened, size), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for metadata in images
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
    elif file.head.hexdigest() != shard.head_sha256:
        found.add(shard.file, "the sha256 of its first 64 KiB differs from the one in dataset.json")
    if not task.in_place and len(samples.locations) != shard.samples:
        found.add(shard.file, f"has {len(samples.locations)} samples, but dataset.json says {shard.samples}")
    found.rows = np.array(samples.rows, INDEX_DTYPE)
    found.checksums = checksum_array(samples.checksums)
    return samples.locations, same


@contextmanager
def _opened(location: Location) -> Iterator[tuple[BinaryIO | RemoteFile, int]]:
    """Open a file, and provide it with its size in bytes. Raises OSError, which names the file."""
    if isinstance(location, str):
        with remote.opened(location) as file:
            yield file, file.size
    else:
        with path_in_errors(location), open(location, "rb") as local:
            yield local, os.fstat(local.fileno()).st_size


class _Hashed:
    """A file that is read sequentially and hashed on the way: all of it, and its first HEAD_BYTES."""

    def __init__(self, file: BinaryIO | RemoteFile):
        self._file, self.position, self.digest, self.head = file, 0, sha256(), sha256()

    def read(self, size: int) -> bytes:
        data = read_fully(self._file, size)
        if self.position < HEAD_BYTES:
            self.head.update(data[: HEAD_BYTES - self.position])
        self.position += len(data)
        self.digest.update(data)
        return data


def _members(file: _Hashed, size: int, name: str, found: Findings) -> Iterator[Member]:
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
            yield Member(header.name, start + _BLOCK, content)
        else:
            found.add(name, "is not a regular file", start, header.name)
    if end is None:
        found.add(name, "ends without the zeros that end a tar", file.position)


def _indexed(file: _Hashed, rows: np.ndarray | None) -> Iterator[tuple[Member, np.ndarray]]:
    """Yield the members to which the rows point, with their rows. Reads to the end."""
    for row in () if rows is None else np.sort(rows, order="offset"):
        before = file.read(int(row["offset"]) - file.position)
        name = before[-_BLOCK:][:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
        yield Member(name, file.position, file.read(int(row["size"]))), row
    while file.read(1 << 20):
        pass
