"""The tables of a run: CSV files to which whole rows are appended exactly once, even if the disk fails."""

import csv
import io
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.files import atomic_write, path_in_errors, sync
from pipeline.retry import read_with_retries


class Table:
    """A CSV file of rows that each have a `step`."""

    def __init__(self, path: Path):
        self.path = path
        self._head = b""
        self._waiting = b""  # rows that have not been written yet
        self._begun: int | None = None  # the offset in bytes at which a failed write of them began
        self._lock = threading.Lock()  # a checkpoint's thread syncs the rows up to it

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. If it cannot be written, it is kept for the next call or for `sync`."""
        with self._lock:
            self._head = _line(row)
            self._waiting += _line(row.values())
            with suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Write all rows to the disk. Raises OSError, which names the file."""
        with self._lock:
            if self._waiting:
                self._write()
            with suppress(FileNotFoundError), path_in_errors(self.path), open(self.path, "r+b") as file:
                sync(file.fileno(), self.path)

    def _write(self) -> None:
        """Write all waiting rows or none of them. Raises OSError, which names the file."""
        with path_in_errors(self.path):
            self._take_back()
            try:
                with open(self.path, "ab") as file:
                    self._begun = file.seek(0, os.SEEK_END)
                    file.write(self._waiting if self._begun else self._head + self._waiting)
            except OSError:
                with suppress(OSError):  # the first error is the one to report
                    self._take_back()
                raise
        self._waiting, self._begun = b"", None

    def _take_back(self) -> None:
        """Cut off what a failed write has left: part of the rows, or all of them if only closing failed."""
        if self._begun is not None:
            with suppress(FileNotFoundError):
                os.truncate(self.path, self._begun)
            self._begun = None

    def rows(self) -> list[dict[str, float]]:
        """Return all rows. Raises OSError, which names the file."""
        try:
            text = read_with_retries(self.path).decode()
        except FileNotFoundError:
            return []
        lines = io.StringIO(text, newline="")
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]

    def truncate(self, step: int) -> None:
        """Drop the rows after a step, since that work is done again. Raises OSError, which names the file."""
        try:
            text = read_with_retries(self.path).decode()
        except FileNotFoundError:
            return
        if not text:
            return
        head, *lines = text.splitlines(keepends=True)
        column = head.strip().split(",").index("step")
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[column]) <= step]
        with atomic_write(self.path) as file:
            file.write("".join([head, *kept]).encode())


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode()
