"""Read the JPEG files of samples from the shards, by sample number."""

import os
import resource
import tarfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import close_quietly, path_in_errors
from pipeline.machine import memory_bytes
from pipeline.manifest import HEAD_BYTES, DatasetError, Manifest, Shard
from pipeline.plan import Plan
from pipeline.retry import is_outage, with_retries
from pipeline.shards import read_index

_BLOCK = tarfile.BLOCKSIZE
# A split is cached if it takes a quarter of the memory or less: the page cache may hold the same bytes, and
# other programs need memory too.
_CACHE_DIVISOR = 4


class OutageError(DatasetError):
    """The storage cannot be read at present, though the samples may be undamaged."""


class JpegFiles(NamedTuple):
    """The JPEG files of n samples.

    buffer: uint8, holds the bytes of all of them. starts: int64 [n], the offset of each in the buffer. jpegs:
    a view of the buffer for each. fresh: int64, the indices, 0 to n − 1, of those that were just read; the
    others were cached. failures: for those that could not be read, the reason by index.
    """

    buffer: np.ndarray
    starts: np.ndarray
    jpegs: list[memoryview]
    fresh: np.ndarray
    failures: dict[int, str]


class ShardReader:
    """Reads a split's samples by number: their index in `rows`, an array [samples] of INDEX_DTYPE.

    Opening checks that each shard exists, and has the size and the first bytes that were packed. It raises
    DatasetError, which names the first shard that does not. Checksums of whole shards are left to
    tools/verify_shards.py, because they require reading everything.

    The shards stay open, so one that is deleted or replaced is still read as it was. They are read and never
    mapped: reading a truncated file returns, whereas touching a map of it would kill the process.

    Reads that fail are retried for some seconds, because a short network failure must not change what a net
    is trained on.

    A split that fits in memory is cached, each sample from when it is first read. processes: the number of
    processes on this machine, each of which has its own cache. others: datasets with the same class ids,
    whose samples of the split follow those of the first dataset, with the labels of that one.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        split: str,
        processes: int = 1,
        others: Sequence[tuple[Path, Manifest]] = (),
    ):
        self.split = manifest.split(split)
        self.rows = _read_rows(root, manifest, split)
        self.shards = [(root / shard.file, shard) for shard in self.split.shards]
        labels = {entry.id: label for label, entry in enumerate(manifest.classes)}
        for folder, other in others:
            rows = _read_rows(folder, other, split)
            rows["label"] = np.array([labels[entry.id] for entry in other.classes])[rows["label"]]
            rows["shard"] += len(self.shards)
            self.rows = np.concatenate((self.rows, rows))
            self.shards += [(folder / shard.file, shard) for shard in other.split(split).shards]
        self._ends = np.cumsum(self.rows["size"], dtype=np.int64)
        self._cache = _allocate_cache(int(self._ends[-1]), processes)
        self._is_cached = np.zeros(len(self.rows), bool)
        _allow_open_files(len(self.shards))
        self._unreadable_shards: set[int] = set()  # those with a sample that stayed unreadable after retries
        self._files: list[int] = []
        weakref.finalize(self, _close_all, self._files)
        self._open_shards()

    def _open_shards(self) -> None:
        self._files += map(self._opened, range(len(self.shards)))

    def _opened(self, shard: int) -> int:
        return with_retries(partial(open_shard, *self.shards[shard]))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray) -> JpegFiles:
        """Read the files of samples by number, which takes four microseconds each from the page cache.

        Threads would not be faster, because each read releases and acquires Python's global lock. Raises
        OutageError if the storage cannot be read; lost bytes are reported as failures.
        """
        rows = self.rows[numbers]
        if self._cache is None:
            ends = np.cumsum(rows["size"], dtype=np.int64)
            buffer, fresh = np.empty(int(rows["size"].sum(dtype=np.int64)), np.uint8), np.arange(len(rows))
        else:
            buffer, ends = self._cache, self._ends[numbers]
            fresh = np.flatnonzero(~self._is_cached[numbers])
        starts, view = ends - rows["size"], memoryview(buffer.data)
        jpegs = [view[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        failures = {}
        shards, offsets = rows["shard"][fresh].tolist(), rows["offset"][fresh].tolist()
        for index, shard, offset in zip(fresh.tolist(), shards, offsets, strict=True):
            jpeg = jpegs[index]
            try:
                complete = os.preadv(self._files[shard], (jpeg,), offset) == len(jpeg)
            except OSError:
                complete = False
            if not complete and (failure := self._read_with_retries(shard, jpeg, offset)):
                failures[index] = failure
        if self._cache is not None:
            self._is_cached[numbers[fresh]] = True
            self._is_cached[numbers[list(failures)]] = False
        return JpegFiles(buffer, starts, jpegs, fresh, failures)

    def evict(self, number: int) -> None:
        """Drop a sample from the cache, so that it is read again next time, because its bytes are damaged."""
        self._is_cached[number] = False

    def _read_with_retries(self, shard: int, target: memoryview, offset: int) -> str | None:
        """Fill `target` from a shard, with retries.

        Returns None, or what is wrong, as a predicate, if the bytes are lost. Raises OutageError if the
        storage cannot be read.
        """
        path, _ = self.shards[shard]

        def read() -> None:
            try:
                with path_in_errors(path):
                    _read_all(self._files[shard], target, offset)
            except OSError as error:
                if is_outage(error):
                    self._reopen(shard)
                raise

        try:
            try:
                read()
            except OSError as error:
                if shard in self._unreadable_shards and not is_outage(error):
                    raise  # without another retry: a lost shard would delay each step
                with_retries(read)
        except EOFError as error:
            return f"cannot be read: {error}"
        except OSError as error:
            if is_outage(error):
                raise OutageError(
                    f"{path} cannot be read: {error.strerror}. Run the same command again once it can be"
                ) from error
            self._unreadable_shards.add(shard)
            return f"cannot be read: {error.strerror}"
        return None

    def _reopen(self, shard: int) -> None:
        """Open a shard again if possible, because a descriptor of a lost mount stays invalid."""
        with suppress(OSError, DatasetError):
            file = open_shard(*self.shards[shard])
            os.dup2(file, self._files[shard])
            os.close(file)

    def jpegs(self, numbers: np.ndarray) -> list[memoryview]:
        """Return samples' files, by number. Raises DatasetError, which names the first unreadable sample."""
        files = self.read(numbers)
        if files.failures:
            index, failure = next(iter(files.failures.items()))
            location = self.location(numbers[index])
            raise DatasetError(f"the sample in {location} {failure}: copy the shard again")
        return files.jpegs

    def jpeg(self, number: int) -> memoryview:
        """Return one sample's file. Raises DatasetError as `jpegs` does."""
        return self.jpegs(np.array([number]))[0]

    def prefetch(self, numbers: np.ndarray) -> None:
        """Have the kernel read these samples into the page cache, without waiting for them."""
        for shard, offset, size, *_ in self.rows[np.sort(numbers)].tolist():  # in the order on the disk
            with suppress(OSError):  # reading will report it
                os.posix_fadvise(self._files[shard], offset, size, os.POSIX_FADV_WILLNEED)

    def check_window(self, window: int, rank: int, world: int) -> None:
        """Raise DatasetError if a process cannot read its part of the split with `window` shards shuffled
        together (0: all).
        """

    def follow(self, plan: Plan, step: int, rank: int, world: int) -> None:
        """Prepare to read the samples of a process in a plan, from a step on. Local shards need no
        preparation.
        """

    def advance(self, step: int) -> None:
        """Note that the plan has been followed up to a step."""

    def read_in_order(self, samples: range | None) -> None:
        """Prepare to read consecutive samples; None means that they have been read."""

    def retry_lost(self) -> np.ndarray:
        """Have lost shards looked for again, and return which samples that may bring back: bool [samples].

        A local shard is not restored while it is open.
        """
        return np.zeros(len(self), bool)

    @property
    def is_kept_in_memory(self) -> bool:
        """Whether each sample is kept in this process's memory once it has been read."""
        return self._cache is not None

    @property
    def fits_in_page_cache(self) -> bool:
        """Whether the split, once read, can be expected to stay in the page cache."""
        return 2 * sum(shard.bytes for _, shard in self.shards) < memory_bytes()

    def key(self, number: int) -> str:
        """Read the sample's key from its tar header. Raises DatasetError if the header is damaged."""
        shard, offset, *_ = self.rows[number].tolist()
        block = bytearray(_BLOCK)
        if failure := self._read_with_retries(shard, memoryview(block), offset - _BLOCK):
            raise DatasetError(
                f"the tar header before {self.location(number)} {failure}: copy the shard again"
            )
        try:
            return key_in_header(block)
        except tarfile.HeaderError:
            raise DatasetError(
                f"there is no tar header before {self.location(number)}: copy the shard again"
            ) from None

    def location(self, number: int) -> str:
        """Describe where a sample is, for messages: its shard, and the offset of its JPEG in bytes."""
        row = self.rows[number]
        path, _ = self.shards[row["shard"]]
        return f"{path} at byte {row['offset']}"


def key_in_header(block: bytes | bytearray) -> str:
    """Return the key of the sample whose tar header this is. Raises tarfile.HeaderError if it is none."""
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    folder, slash, name = header.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _read_rows(root: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Read a split's index, and check the sides of its images. Raises as `read_index` does."""
    record = manifest.split(split)
    rows = read_index(root, record, len(manifest.classes))
    for side, limit in (("width", manifest.max_width), ("height", manifest.max_height)):
        if not 0 < rows[side].min() <= rows[side].max() <= limit:
            raise DatasetError(
                f"the index {root / record.index} disagrees with dataset.json, which says that each "
                f"{side} is from 1 to {limit}: pack the dataset again"
            )
    return rows


def _allocate_cache(size: int, processes: int) -> np.ndarray | None:
    """Allocate a cache of `size` bytes, or return None if memory is scarce.

    The system provides the memory only as it is written to.
    """
    if processes * size > memory_bytes() // _CACHE_DIVISOR:
        return None
    try:
        return np.empty(size, np.uint8)
    except MemoryError:  # the process has a limit, or the system does not overcommit
        return None


def open_shard(path: Path, shard: Shard) -> int:
    """Open a shard, check that it is the one that was packed, and return its descriptor."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise DatasetError(f"the shard {path} is missing: copy it again, or pack the dataset again") from None
    try:
        with suppress(OSError):  # not supported
            # This must come before the first read, or the kernel reads ahead, and FUSE then drops most of
            # what `prefetch` asks for.
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        head = b""
        with path_in_errors(path):
            actual = os.fstat(file).st_size
            if actual != shard.bytes:
                raise DatasetError(
                    f"the shard {path} has {actual} bytes, but dataset.json says {shard.bytes}: copy it again"
                )
            while part := os.pread(file, HEAD_BYTES - len(head), len(head)):
                head += part
        if sha256(head).hexdigest() != shard.head_sha256:
            raise DatasetError(f"the shard {path} is not the one that was packed: copy it again")
    except BaseException:
        close_quietly(file)
        raise
    return file


def _close_all(files: list[int]) -> None:
    for file in files:
        close_quietly(file)


def _read_all(file: int, target: memoryview, offset: int) -> None:
    """Fill `target` from the file. Raises EOFError if the file ends too early, or OSError."""
    while target:
        count = os.preadv(file, (target,), offset)
        if not count:
            raise EOFError("the shard has become shorter")
        target, offset = target[count:], offset + count


def _allow_open_files(count: int) -> None:
    """Raise the soft limit on open files, often 1024, so that `count` more can be opened, and others later.

    All shards stay open, and large datasets have more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/dev/fd")) + count + 1024  # noqa: PTH208 – only their number
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
