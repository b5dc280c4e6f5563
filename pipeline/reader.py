"""Samples read from the shards, by number."""

import os
import resource
import tarfile
import weakref
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import close_quietly, naming
from pipeline.machine import memory_bytes
from pipeline.manifest import HEAD_BYTES, DatasetError, Manifest, Shard
from pipeline.retry import is_outage, patiently, say_on_stderr
from pipeline.shards import read_index

_BLOCK = tarfile.BLOCKSIZE
_SHARE_TO_KEEP = 4  # a quarter of the memory: the page cache may have the same bytes, and others need some


class OutageError(DatasetError):
    """Storage that cannot be read at present, though nothing may be wrong with the samples."""


class Files(NamedTuple):
    """The bytes of n samples.

    buffer: uint8, in which all of them are. starts: int64 [n], where each begins. jpegs: each as a view of
    the buffer. fresh: int64, the places in the row of those that were read just now; the others were in
    memory. failures: why some could not be read, by their place in the row.
    """

    buffer: np.ndarray
    starts: np.ndarray
    jpegs: list[memoryview]
    fresh: np.ndarray
    failures: dict[int, str]


class ShardReader:
    """A split's samples by number.

    rows: [samples] of INDEX_DTYPE. Opening checks that each file is there, as long as packed, and
    begins with the bytes that were packed; it raises DatasetError that names the first that is
    not. Whole-file checksums are a matter for a verifying tool: they would read everything.

    The files stay open: one that is deleted, or gets another in its place, is read on as it was. They are
    read and never mapped: a read of a file cut short returns, where a map would kill the process.

    What fails is tried again for some seconds: a network that stumbles must not change what is trained on.

    A split that fits stays in memory: each sample is kept where it was first read to. processes: on this
    machine, of which each keeps its own.
    """

    def __init__(self, root: Path, manifest: Manifest, split: str, processes: int = 1):
        self.root = root
        self.split = manifest.split(split)
        self.rows = read_index(root, self.split, len(manifest.classes))
        for side, most in (("width", manifest.max_width), ("height", manifest.max_height)):
            if not 0 < self.rows[side].min() <= self.rows[side].max() <= most:
                raise DatasetError(
                    f"the index {root / self.split.index} disagrees with dataset.json, which says that each "
                    f"{side} is 1 to {most}: pack the dataset again"
                )
        self._ends = np.cumsum(self.rows["size"], dtype=np.int64)
        self._kept = _room_to_keep(int(self._ends[-1]), processes)
        self._is_kept = np.zeros(len(self.rows), bool)
        _allow_open_files(len(self.split.shards))
        self._given_up: set[int] = set()  # shards with a sample that stayed unreadable
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for shard in self.split.shards:
            open_shard = partial(_open_shard, root / shard.file, shard)
            self._files.append(patiently(open_shard, say_on_stderr))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray) -> Files:
        """The file bytes of samples, in four microseconds each from the page cache.

        A thread would read them no sooner: each read gives Python's lock away and has to get it back.
        Raises OutageError while the storage cannot be read.
        """
        rows = self.rows[numbers]
        if self._kept is None:
            ends = np.cumsum(rows["size"], dtype=np.int64)
            buffer, fresh = np.empty(int(rows["size"].sum(dtype=np.int64)), np.uint8), np.arange(len(rows))
        else:
            buffer, ends = self._kept, self._ends[numbers]
            fresh = np.flatnonzero(~self._is_kept[numbers])
        starts, room = ends - rows["size"], memoryview(buffer.data)
        jpegs = [room[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        failures = {}
        shards, offsets = rows["shard"][fresh].tolist(), rows["offset"][fresh].tolist()
        for place, shard, offset in zip(fresh.tolist(), shards, offsets, strict=True):
            jpeg = jpegs[place]
            try:
                whole = os.preadv(self._files[shard], (jpeg,), offset) == len(jpeg)
            except OSError:
                whole = False
            if not whole and (failure := self._read_patiently(shard, jpeg, offset)):
                failures[place] = failure
        if self._kept is not None:
            self._is_kept[numbers[fresh]] = True
            self._is_kept[numbers[list(failures)]] = False
        return Files(buffer, starts, jpegs, fresh, failures)

    def forget(self, number: int) -> None:
        """Have a sample read again when it is asked for: what was read of it is damaged."""
        self._is_kept[number] = False

    def _read_patiently(self, shard: int, room: memoryview, offset: int) -> str | None:
        """Fill `room` where one read has not. Returns what is wrong if these bytes are lost, as the end of a
        sentence, or None. Raises OutageError."""
        path = self.root / self.split.shards[shard].file

        def read() -> None:
            try:
                with naming(path):
                    _read_all(self._files[shard], room, offset)
            except OSError as error:
                if is_outage(error):
                    self._reopen(shard)
                raise

        try:
            try:
                read()
            except OSError as error:
                if shard in self._given_up and not is_outage(error):
                    raise  # or a lost shard would hold up each step
                patiently(read, say_on_stderr)
        except EOFError as error:
            return f"cannot be read: {error}"
        except OSError as error:
            if is_outage(error):
                raise OutageError(
                    f"{path} cannot be read: {error.strerror}. Give the same command again when it can"
                ) from error
            self._given_up.add(shard)
            return f"cannot be read: {error.strerror}"
        return None

    def _reopen(self, shard: int) -> None:
        """Get another handle of a file, if it is there: one that went stale with its mount stays so."""
        with suppress(OSError, DatasetError):
            record = self.split.shards[shard]
            file = _open_shard(self.root / record.file, record)
            os.dup2(file, self._files[shard])
            os.close(file)

    def jpegs(self, numbers: np.ndarray) -> list[memoryview]:
        """The same without the rest. Raises DatasetError that names the first that cannot be read."""
        files = self.read(numbers)
        for place, why in files.failures.items():
            raise DatasetError(f"the sample in {self.name(numbers[place])} {why}: copy the shard again")
        return files.jpegs

    def jpeg(self, number: int) -> memoryview:
        """The same of one."""
        return self.jpegs(np.array([number]))[0]

    def will_need(self, numbers: np.ndarray) -> None:
        """Have the kernel fetch what of these samples is not in memory, without waiting for it."""
        for shard, offset, size, *_ in self.rows[np.sort(numbers)].tolist():  # in the order of the disk
            with suppress(OSError):  # of which reading will tell
                os.posix_fadvise(self._files[shard], offset, size, os.POSIX_FADV_WILLNEED)

    @property
    def stays_in_memory(self) -> bool:
        """Whether the split, once read, can be expected to stay in the page cache."""
        return 2 * sum(shard.bytes for shard in self.split.shards) < memory_bytes()

    def key(self, number: int) -> str:
        """The sample's key, from its header in the tar. Raises DatasetError where that is damaged."""
        shard, offset, *_ = self.rows[number].tolist()
        block = bytearray(_BLOCK)
        if failure := self._read_patiently(shard, memoryview(block), offset - _BLOCK):
            raise DatasetError(f"the tar header before {self.name(number)} {failure}: copy the shard again")
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


def _room_to_keep(size: int, processes: int) -> np.ndarray | None:
    """Memory for so many bytes, which the system gives as it is written to; None where it is scarce."""
    if processes * size > memory_bytes() // _SHARE_TO_KEEP:
        return None
    try:
        return np.empty(size, np.uint8)
    except MemoryError:  # a limit of the process's own, or a system that promises no more than it has
        return None


def _open_shard(path: Path, shard: Shard) -> int:
    """A descriptor of the file, once it is known to be the one that was packed."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DatasetError(f"the shard {path} is missing: copy it again, or pack the dataset again") from None
    try:
        with suppress(OSError):  # where it is not known
            # Before the first read: else the kernel reads on behind it, and FUSE drops most of what
            # `will_need` asks for.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        head = b""
        with naming(path):
            actual = os.fstat(file).st_size
            if actual != shard.bytes:
                raise DatasetError(
                    f"the shard {path} has {actual} bytes and dataset.json says {shard.bytes}: copy it again"
                )
            while part := os.pread(file, HEAD_BYTES - len(head), len(head)):
                head += part
        if sha256(head).hexdigest() != shard.head_sha256:
            raise DatasetError(f"the shard {path} was replaced since it was packed: copy it again")
    except BaseException:
        close_quietly(file)
        raise
    return file


def _close(files: list[int]) -> None:
    for file in files:
        close_quietly(file)


def _read_all(file: int, room: memoryview, offset: int) -> None:
    """Fill `room`, however little comes at a time. Raises EOFError if the file ends before, and OSError."""
    while room:
        count = os.preadv(file, (room,), offset)
        if not count:
            raise EOFError("the shard has become shorter")
        room, offset = room[count:], offset + count


def _allow_open_files(count: int) -> None:
    """Each shard stays open; the usual soft limit of 1024 is fewer than large sets have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
