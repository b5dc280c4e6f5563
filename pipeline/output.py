"""Keep errors of standard output and standard error from ending the work on which they report.

The reader of a pipe dies, the disk with the log is full, the terminal has gone, or a stream is closed or only
takes ASCII: none of this is a reason to stop training. `secure` makes both streams of a process tolerant when
it starts. Text that cannot be written is then dropped, which is reported once on standard error.

The result of a command must not be dropped. Within `printed`, a failed write raises OSError, and a reader
that has gone ends the command silently, as SIGPIPE ends other commands.
"""

import atexit
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE_SECONDS = 5.0  # wait for a reader that reads nothing; then text is dropped until it reads again
_HELP = {"-h", "--help", "--version"}
_stdout: "_Stream | None" = None  # the streams of this process after `secure`
_stderr: "_Stream | None" = None


class _Stream(io.RawIOBase):
    """The raw file of a standard stream, which drops text that cannot be written.

    is_result: whether a failed write raises an error instead.
    """

    def __init__(self, fd: int, name: str):
        self._fd, self.name = fd, name
        self.is_result = self._is_stuck = self._has_failed = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        part = memoryview(data).cast("B")[: select.PIPE_BUF]  # a pipe that is ready takes this much at once
        try:
            while self._is_ready():
                try:
                    return os.write(self._fd, part)
                except BlockingIOError:
                    if not self.is_result:
                        break
        except OSError as error:
            self._fail(error)
        return len(part)

    def _is_ready(self) -> bool:
        """Wait until the reader reads: without limit for a result, otherwise once for PATIENCE_SECONDS."""
        seconds = 0.0 if self._is_stuck else PATIENCE_SECONDS
        self._is_stuck = not self._poll.poll(None if self.is_result else seconds * 1e3)
        return not self._is_stuck

    def _fail(self, error: OSError) -> None:
        is_first, self._has_failed = not self._has_failed, True
        if self.is_result:
            if error.errno == errno.EPIPE:
                raise SystemExit(128 + signal.SIGPIPE)
            raise OSError(error.errno, error.strerror, self.name)
        if self is _stdout and _stderr and is_first and error.errno != errno.EBADF:  # EBADF: a closed stream
            # sys.stderr is not used, because a progress bar redirects it to standard output.
            reason = errno.errorcode.get(error.errno or 0, "error")
            line = f"alexnet-train: {self.name} cannot be written ({reason}): the work goes on without it\n"
            _stderr.write(line.encode())


def secure() -> None:
    """Make the standard streams of this process tolerant. Call it before any file is opened."""
    global _stdout, _stderr
    # Otherwise the next file that is opened would get the number of a closed stream, and the text for it. A
    # read-only stream refuses text, as a closed one does.
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if _stdout is None and sys.stdout is sys.__stdout__:  # not replaced, for example by a test
        _stdout = _Stream(1, "standard output")
        _stdout.is_result = bool(_HELP.intersection(sys.argv[1:]))
        sys.stdout = _text(_stdout, sys.stdout)
        atexit.register(_flush)
    if _stderr is None and sys.stderr is sys.__stderr__:
        _stderr = _Stream(2, "standard error")
        sys.stderr = _text(_stderr, sys.stderr)


def _text(raw: _Stream, before: TextIO | None) -> TextIO:
    """Return a text stream on a raw one, with the encoding of the stream that it replaces, if any."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=raw.fileno() == 2 or getattr(before, "line_buffering", False),
        write_through=getattr(before, "write_through", False),
    )


def _flush() -> None:
    """Write the remaining text at exit, and exit with the code of an error if a result cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        say(f"{error.filename}: {error.strerror}")
        os._exit(1)
    except SystemExit as end:
        os._exit(int(end.code or 0))


@contextmanager
def printed() -> Iterator[None]:
    """Treat what the block prints as the command's result.

    Raises OSError, which names standard output, if it cannot be written, and SystemExit with the exit code of
    SIGPIPE if its reader has gone.
    """
    if _stdout is None:
        yield
        return
    _stdout.is_result = True
    try:
        yield
        sys.stdout.flush()
    finally:
        _stdout.is_result = False  # drops what could not be written


def say(text: str) -> None:
    """Print a line on standard error, prefixed with the project's name."""
    print(f"alexnet-train: {text}", file=sys.stderr, flush=True)
