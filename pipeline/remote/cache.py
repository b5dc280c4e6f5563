"""Keep complete shards in a folder of limited size that the processes of this machine share.

A shard has its final name only once it is complete, checked and on the disk. Until then it is a file
`.NAME.partial`, which the process that fetches it holds locked. The system releases locks when a process
ends, so after a kill at any instant, only partial files may be incomplete, and whoever locks one next starts
it anew. A process that reads a shard holds it locked for reading, and shards that are locked are not evicted.

The size of a partial file is that of the shard from the beginning, so the sizes of all files add up to what
the cache takes, whichever process writes them. The file `.lock` is locked while room is made
and while a shard gets its final name.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.files import close_quietly, path_in_errors, sync, sync_folder
from pipeline.manifest import MANIFEST_NAME, DatasetError, Shard
from pipeline.remote.options import CacheOptions, default_size

_LOCK = ".lock"
_PARTIAL = ".partial"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RemoteShard(NamedTuple):
    """A shard behind a URL. path: where it is in the cache, if it is there."""

    url: str
    path: Path
    record: Shard


class Room(NamedTuple):
    """What may be evicted for a shard.

    known: the shards with a future. victims: those of them that may be evicted, in this order. idle_seconds:
    for how long a shard that is not known must have been unused to be evicted before these.
    """

    known: Set[Path] = frozenset()
    victims: Sequence[Path] = ()
    idle_seconds: float = 0.0


ANYTHING = Room()  # every shard that no process reads


class CacheFullError(DatasetError):
    """There is no room for a shard, and nothing that could be evicted for it."""


class Partial:
    """A shard that is being fetched into a cache. Its methods raise OSError, which names the file."""

    def __init__(self, cache: Path, path: Path, file: int):
        self.path, self._partial, self._file = path, _partial_of(path), file
        self._cache = cache  # its folder

    def write(self, data: bytes, offset: int) -> None:
        """Write a part of the shard. Several threads may write different parts at the same time."""
        view = memoryview(data)
        with path_in_errors(self._partial):
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count

    def read(self, offset: int, size: int) -> bytes:
        """Read what has been written."""
        with path_in_errors(self._partial):
            return os.pread(self._file, size, offset)

    def publish(self, sha256: str) -> bool:
        """Give the shard its final name, if the bytes have this hash; return whether they do."""
        with path_in_errors(self._partial), open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return False
        sync(self._file, self._partial)
        with locked(self._cache):  # or a process that adds up the sizes would miss the file
            self._partial.replace(self.path)
        self._close()
        sync_folder(self.path.parent)
        return True

    def discard(self) -> None:
        """Delete the file, unless it has been published. No other thread may be writing to it."""
        if self._file >= 0:
            with suppress(OSError):
                self._partial.unlink()
            self._close()

    def _close(self) -> None:
        close_quietly(self._file)  # which releases the lock
        self._file = -1


class Cache:
    """The folder of a cache. Raises OSError if it cannot be created, read or written.

    on_eviction: called with the path of each shard that this process evicts.
    """

    def __init__(self, options: CacheOptions, on_eviction: Callable[[Path], None] = lambda path: None):
        self._on_eviction = on_eviction
        self.folder = options.path
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            self._remove_abandoned()
        self.size = options.size or default_size(self.folder, sum(self._sizes().values()))

    def begin(self, path: Path, size: int, room: Room = ANYTHING) -> Partial | None:
        """Begin to fetch a shard, and return its file, or None if it is there or another process fetches it.

        path: where the shard will be. size: in bytes. room: what may be evicted for it. Raises CacheFullError
        if that is not enough.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock_partial(_partial_of(path))
        if file is None:
            return None
        partial = Partial(self.folder, path, file)
        try:
            if path.exists():  # another process has just completed it
                partial.discard()
                return None
            with locked(self.folder):
                os.ftruncate(file, 0)  # what a killed process had fetched
                self._reserve(file, path, size, room)
        except BaseException:
            partial.discard()
            raise
        return partial

    def remove(self, path: Path) -> None:
        """Delete a shard that is damaged, even if processes read it; they go on with what they have open."""
        with suppress(OSError):
            path.unlink()
        self._on_eviction(path)

    def evict(self, path: Path) -> bool:
        """Delete a shard unless a process reads it, and return whether it has been deleted."""
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except OSError:
            return False
        finally:
            close_quietly(file)
        self._on_eviction(path)
        return True

    def _reserve(self, file: int, path: Path, size: int, room: Room) -> None:
        """Make room for a partial file, and give it its size. Raises CacheFullError."""
        sizes = self._sizes()
        excess = sum(sizes.values()) + size - self.size
        if excess > 0:
            self._remove_abandoned()
            sizes = self._sizes()
            excess = sum(sizes.values()) + size - self.size
        candidates = self._candidates(sizes, room)
        while True:
            if excess <= 0:
                try:
                    with path_in_errors(path):
                        os.posix_fallocate(file, 0, size)
                    return
                except OSError as error:
                    if error.errno not in _NO_SPACE:
                        raise
                    os.ftruncate(file, 0)
            victim = next(candidates, None)
            if victim is None:
                raise CacheFullError(
                    f"the cache {self.folder} has no room for {path.name}, and all that it holds is needed: "
                    "give it more space with --cache-size, or free the disk"
                )
            if self.evict(victim):
                excess -= sizes[victim]

    def _candidates(self, sizes: dict[Path, int], room: Room) -> Iterator[Path]:
        """Yield the shards that may be evicted: unknown ones by their last use, and then the victims."""
        strangers = {path: _last_use(path) for path in sizes if _is_complete(path) and path not in room.known}
        latest = time.time() - room.idle_seconds
        yield from sorted(
            (path for path, use in strangers.items() if use <= latest), key=strangers.__getitem__
        )
        yield from (path for path in room.victims if path in sizes)

    def _sizes(self) -> dict[Path, int]:
        """Return the size of each shard, complete or partial, in bytes."""
        sizes = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if name not in (_LOCK, MANIFEST_NAME) and not name.endswith(".npy"):
                    with suppress(FileNotFoundError):  # renamed or evicted meanwhile
                        path = Path(folder, name)
                        sizes[path] = path.stat().st_size
        return sizes

    def _remove_abandoned(self) -> None:
        """Delete the partial files of processes that have ended."""
        for partial in self.folder.rglob(f".*{_PARTIAL}"):
            file = _lock_partial(partial, os.O_RDWR)
            if file is not None:
                with suppress(OSError):
                    partial.unlink()
                close_quietly(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and other threads, from changing what is in a folder at the same time."""
    with open(folder / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_for_reading(file: int) -> bool:
    """Keep an open shard from being evicted until it is closed; return False if it has just been."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    with suppress(OSError):  # the cache may be read-only
        os.utime(file)
    return os.fstat(file).st_nlink > 0


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL}")


def _lock_partial(partial: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int | None:
    """Open and lock a partial file, and return its descriptor, or None if another process has locked it."""
    try:
        file = os.open(partial, flags, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), partial.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # in use, or published or deleted since it was opened
        pass
    close_quietly(file)
    return None


def _is_complete(path: Path) -> bool:
    return not path.name.endswith(_PARTIAL)


def _last_use(path: Path) -> float:
    """Return when a shard was last opened: the time of its last change, which `lock_for_reading` sets."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
