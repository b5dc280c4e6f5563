"""Storage that fails: counts the file-system calls of a job, and makes one of them fail.

While entered, `Storage` replaces functions of os, io and fcntl, so it sees what Python does with files below
one folder, but not what C libraries do by themselves. A call is identified by its name, its file and how
often that pair occurred before, which is the same in every run of a single-threaded job.
"""

import builtins
import errno
import fcntl
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

SHORT = "SHORT"  # not an error: less is read or written than requested
TWICE = "TWICE"  # not an error: an entry of a folder is listed twice

# The errors that each call may return. `open` is for reading, `create` for writing.
ERRORS = {
    "open": ("EACCES", "ENOENT", "EIO", "ESTALE", "EMFILE", "ENOTCONN"),
    "create": ("EACCES", "EROFS", "ENOSPC", "ESTALE", "EMFILE"),
    "read": ("EIO", "ESTALE", "ENOTCONN", "EAGAIN", SHORT),
    "write": ("ENOSPC", "EDQUOT", "EIO", "ESTALE", SHORT),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "stat": ("EACCES", "EIO", "ESTALE", "ETIMEDOUT"),
    "scandir": ("EACCES", "EIO", "ESTALE", "EMFILE", "ENOMEM"),
    "readdir": ("EIO", "ESTALE", TWICE),
    "mkdir": ("EACCES", "ENOSPC", "EIO"),
    "replace": ("EACCES", "EIO", "ESTALE", "ENOSPC"),
    "link": ("EPERM", "ENOTSUP", "EMLINK", "EIO"),
    "unlink": ("EACCES", "EBUSY", "EIO", "ESTALE"),
    "rmdir": ("ENOTEMPTY", "EBUSY", "EIO"),
    "fsync": ("EINVAL", "ENOTSUP", "EIO", "ENOSPC"),
    "fsync of a folder": ("EINVAL", "EBADF", "EACCES", "EIO"),
    "truncate": ("EACCES", "EIO", "ESTALE"),
    "fadvise": ("ENOSYS", "EINVAL"),
    "flock": ("ENOLCK", "ENOSYS", "ENOTSUP", "EIO"),
}
_FUNCTIONS = {call: call for call in ("open", "stat", "mkdir", "replace", "link", "unlink", "rmdir")}
_FUNCTIONS |= {"lstat": "stat", "rename": "replace", "remove": "unlink"}
_FUNCTIONS |= {"posix_fadvise": "fadvise", "truncate": "truncate"}
_open, _fstat, _scandir, _pread, _preadv = open, os.fstat, os.scandir, os.pread, os.preadv
_RANDOM = re.compile(r"(?<=/tmp)\w{8}(?=/|$)")  # in the names that tempfile generates


class Call(NamedTuple):
    """A kind of call. path: relative to the folder, without random parts."""

    name: str
    path: str


class Fault(NamedTuple):
    """A call that fails at its occurrence number `time`; lasting: and at every later one."""

    call: Call
    time: int
    error: str
    lasting: bool

    def __str__(self) -> str:
        number = f"{self.time} on" if self.lasting else f"{self.time}"
        return f"{self.call.name} {self.call.path}, number {number}: {self.error}"


class Storage:
    """Counts and fails calls. calls: occurrences of each. hits: occurrences of the fault."""

    def __init__(self, folder: Path, fault: Fault | None = None):
        self.folder, self.fault = f"{folder}/", fault
        self.calls: Counter[Call] = Counter()
        self.hits = 0
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for name, call in _FUNCTIONS.items():
            self._put(os, name, self._before(call, getattr(os, name)))
        self._put(fcntl, "flock", self._before("flock", fcntl.flock))
        self._put(os, "scandir", self._scandir)
        self._put(os, "listdir", self._listdir)
        self._put(os, "fsync", self._fsync)
        self._put(os, "pread", self._pread)
        self._put(os, "preadv", self._preadv)
        self._put(builtins, "open", self._open)
        self._put(io, "open", self._open)
        return self

    def _put(self, owner: Any, name: str, function: Callable) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, function))

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def meet(self, name: str, file: Any) -> str | None:
        """Count a call. Raises the OSError that it must fail with, or returns SHORT or TWICE."""
        path = self._path(file)
        if path is None:
            return None
        call = Call(name, _RANDOM.sub("*", path))
        self.calls[call] += 1
        fault, time = self.fault, self.calls[call]
        if fault is None or fault.call != call:
            return None
        if time < fault.time or (time > fault.time and not fault.lasting):
            return None
        self.hits += 1
        if fault.error in (SHORT, TWICE):
            return fault.error
        number = getattr(errno, fault.error)
        # Like the system's errors: functions that take a descriptor do not name the file.
        raise OSError(
            number, os.strerror(number), *([str(file)] if isinstance(file, (str, os.PathLike)) else [])
        )

    def _path(self, file: Any) -> str | None:
        """Return a file's path relative to the folder, or None if it is outside."""
        if hasattr(file, "fileno"):
            file = file.fileno()
        name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(file)  # noqa: PTH100, PTH115
        name = os.fsdecode(name).removesuffix(" (deleted)")  # suffix in /proc for a deleted open file
        return name[len(self.folder) :] if f"{name}/".startswith(self.folder) else None

    def _before(self, call: str, real: Callable) -> Callable:
        def function(*arguments: Any, **options: Any) -> Any:
            file = arguments[1] if call in ("replace", "link") else arguments[0]
            if (folder := options.get("dir_fd")) is not None:  # as in rmtree
                file = f"{os.readlink(f'/proc/self/fd/{folder}')}/{os.fsdecode(file)}"  # noqa: PTH115
            self.meet(call, file)
            return real(*arguments, **options)

        return function

    def _fsync(self, file: Any) -> None:
        is_folder = stat.S_ISDIR(_fstat(file if isinstance(file, int) else file.fileno()).st_mode)
        # Not executed, as tests have no power failure.
        self.meet("fsync of a folder" if is_folder else "fsync", file)

    def _pread(self, file: int, size: int, offset: int) -> bytes:
        is_short = self.meet("read", file) == SHORT
        return _pread(file, -(-size // 3) if is_short else size, offset)

    def _preadv(self, file: int, rooms: Any, offset: int) -> int:
        is_short = self.meet("read", file) == SHORT
        return _preadv(file, [rooms[0][: max(1, len(rooms[0]) // 3)]] if is_short else rooms, offset)

    def _scandir(self, path: Any = ".") -> "_Listing":
        self.meet("scandir", path)
        return _Listing(self, path, _scandir(path))

    def _listdir(self, path: Any = ".") -> list[str]:
        with self._scandir(path) as entries:
            return [entry.name for entry in entries]

    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, **how: Any,
    ) -> Any:  # fmt: skip
        if isinstance(file, int) or how or self._path(file) is None:
            return _open(file, mode, buffering, encoding, errors, newline, **how)
        self.meet("open" if mode.strip("bt") == "r" else "create", file)
        raw = _File(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered: Any = io.BufferedReader if mode.strip("bt") == "r" else io.BufferedWriter
        if "+" in mode:
            buffered = io.BufferedRandom
        content = buffered(raw, size)
        return content if "b" in mode else io.TextIOWrapper(content, encoding, errors, newline)


class _File(io.FileIO):
    """A file whose reads and writes are counted."""

    def __init__(self, storage: Storage, path: Any, mode: str):
        self._storage = storage
        super().__init__(path, mode)

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer)
        size = self._size(len(view))
        return None if size is None else super().readinto(view[:size])

    def readall(self) -> bytes | None:  # type: ignore[override]
        return None if self._size(1) is None else super().readall()  # it continues after a short read

    def read(self, size: int | None = -1, /) -> bytes | None:  # type: ignore[override]
        if size is None or size < 0:
            return self.readall()
        size = self._size(size)
        return None if size is None else super().read(size)

    def _size(self, asked: int) -> int | None:
        """Return the size that a read may request; None for EAGAIN, which FileIO also turns into None."""
        try:
            is_short = self._storage.meet("read", self.fileno()) == SHORT
        except BlockingIOError:
            return None
        return max(1, asked // 3) if is_short else asked

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        is_short = self._storage.meet("write", self.fileno()) == SHORT
        return super().write(view[: max(1, len(view) // 3)] if is_short else view)

    def close(self) -> None:
        path = None if self.closed or not self.writable() else os.readlink(f"/proc/self/fd/{self.fileno()}")  # noqa: PTH115
        super().close()
        if path:
            try:
                self._storage.meet("close", path)
            except OSError as error:
                raise OSError(error.errno, error.strerror) from None  # without the file's name


class _Listing:
    """The iterator that os.scandir returns."""

    def __init__(self, storage: Storage, path: Any, real: Any):
        self._storage, self._path, self._real = storage, path, real
        self._again: os.DirEntry | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> os.DirEntry:
        if self._again is not None:
            entry, self._again = self._again, None
            return entry
        entry = next(self._real)
        if self._storage.meet("readdir", self._path) == TWICE:
            self._again = entry
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def close(self) -> None:
        self._real.close()
