"""Append rows to the CSV tables of a run, each row completely and exactly once, even if the disk fails."""

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
    """A CSV file whose rows each have a column `step`."""

    def __init__(self, path: Path):
        self.path = path
        self._header = b""
        self._pending = b""  # rows that have not been written yet, as CSV
        self._write_offset: int | None = None  # byte offset at which a failed write of them began
        self._lock = threading.Lock()  # the thread that saves checkpoints calls `sync`

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. If it cannot be written, it is kept for the next call or for `sync`."""
        with self._lock:
            self._header = _line(row)
            self._pending += _line(row.values())
            with suppress(OSError):
                self._write()

    def sync(self) -> None:
        """Write all rows to the disk. Raises an OSError that names the file."""
        with self._lock:
            if self._pending:
                self._write()
            with suppress(FileNotFoundError), path_in_errors(self.path), open(self.path, "r+b") as file:
                sync(file.fileno(), self.path)

    def _write(self) -> None:
        """Write either all pending rows or none. Raises an OSError that names the file."""
        with path_in_errors(self.path):
            self._roll_back()
            try:
                with open(self.path, "ab") as file:
                    self._write_offset = file.seek(0, os.SEEK_END)
                    file.write(self._pending if self._write_offset else self._header + self._pending)
            except OSError:
                with suppress(OSError):  # the first error is the one to report
                    self._roll_back()
                raise
        self._pending, self._write_offset = b"", None

    def _roll_back(self) -> None:
        """Cut off what a failed write has left: some of the rows, or all of them if only closing failed."""
        if self._write_offset is not None:
            with suppress(FileNotFoundError):
                os.truncate(self.path, self._write_offset)
            self._write_offset = None

    def rows(self) -> list[dict[str, float]]:
        """Return the rows in the file, or none if there is no file. Raises an OSError that names the file."""
        try:
            text = read_with_retries(self.path).decode()
        except FileNotFoundError:
            return []
        lines = io.StringIO(text, newline="")
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines)]

    def truncate(self, step: int) -> None:
        """Delete the rows of later steps, which will be repeated. Raises an OSError that names the file."""
        try:
            text = read_with_retries(self.path).decode()
        except FileNotFoundError:
            return
        if not text:
            return
        header, *lines = text.splitlines(keepends=True)
        column = header.strip().split(",").index("step")
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[column]) <= step]
        with atomic_write(self.path) as file:
            file.write("".join([header, *kept]).encode())


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode()
