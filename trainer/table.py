"""Append rows to the CSV tables of a run, each row completely and exactly once, even if the disk fails."""

import csv
import io
import math
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.documents import ContentError
from pipeline.files import atomic_write, path_in_errors, sync
from pipeline.retry import read_with_retries


class Table:
    """A CSV file. columns: names of the columns that it must have, including `step`."""

    def __init__(self, path: Path, columns: Iterable[str] = ("step",)):
        self.path, self.columns = path, columns
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
        """Return the rows in the file, or none if there is no file.

        Raises ContentError, or an OSError that names the file.
        """
        _, rows = self._read()
        return [row for _, row in rows]

    def truncate(self, step: int) -> None:
        """Delete the rows of later steps, which will be repeated. Raises as `rows` does."""
        header, rows = self._read(step)
        if self.path.exists():
            with atomic_write(self.path) as file:
                file.write(b"".join([header, *(line for line, _ in rows)]))

    def _read(self, step: float = math.inf) -> tuple[bytes, list[tuple[bytes, dict[str, float]]]]:
        """Return the header, and the lines of the rows up to a step with their values.

        Lines after the last of these rows were written after the last checkpoint, and a power cut may have
        truncated them or filled them with zeros. Raises ContentError if a line before them is damaged.
        """
        try:
            header, *lines = read_with_retries(self.path).splitlines(keepends=True) or [b""]
        except FileNotFoundError:
            header, lines = b"", []
        if not lines and not header.endswith(b"\n"):  # there is no complete line
            return b"", []
        columns = header.decode(errors="replace").strip().split(",")
        for name in self.columns:
            if name not in columns:
                raise ContentError(
                    f"{self.path} is damaged (line 1 names no {name}): restore it from a copy, or delete it"
                )
        rows = [(line, _values(columns, line)) for line in lines]
        while rows and (rows[-1][1] is None or rows[-1][1]["step"] > step):
            rows.pop()
        for number, (_, row) in enumerate(rows, start=2):
            if row is None:
                raise ContentError(
                    f"{self.path} is damaged (line {number}): restore it from a copy, or delete that line"
                )
        return header, [(line, row) for line, row in rows if row is not None and row["step"] <= step]


def _values(columns: list[str], line: bytes) -> dict[str, float] | None:
    """Return the values of a row, or None if it is truncated or damaged."""
    try:
        values = [float(text) for text in line.decode().split(",")]
    except ValueError:
        return None
    row = dict(zip(columns, values, strict=False))
    is_complete = line.endswith(b"\n") and len(values) == len(columns) and math.isfinite(row["step"])
    return row if is_complete else None


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode()
