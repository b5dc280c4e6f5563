"""The tables of a run: CSV files to which whole rows are appended exactly once, even if the disk fails."""

import csv
import io
import math
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.files import atomic_write, naming, sync
from pipeline.retry import read_patiently
from trainer.reading import ContentError


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
            with suppress(FileNotFoundError), naming(self.path), open(self.path, "r+b") as file:
                sync(file.fileno(), self.path)

    def _write(self) -> None:
        """Write all waiting rows or none of them. Raises OSError, which names the file."""
        with naming(self.path):
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
        """Return all rows. Raises ContentError, or OSError, which names the file."""
        _, rows = self._read()
        return [row for _, row in rows]

    def truncate(self, step: int) -> None:
        """Drop the rows after a step, since that work is done again. Raises as `rows` does."""
        head, rows = self._read(step)
        if self.path.exists():
            with atomic_write(self.path) as file:
                file.write(b"".join([head, *(line for line, _ in rows)]))

    def _read(self, step: float = math.inf) -> tuple[bytes, list[tuple[bytes, dict[str, float]]]]:
        """Return the first line, and the lines of the rows up to a step with their values.

        Whatever follows the last of them was written after the last checkpoint, and a power cut may have cut
        it short or filled it with zeros. Raises ContentError if a line before it is damaged.
        """
        try:
            head, *lines = read_patiently(self.path).splitlines(keepends=True) or [b""]
        except FileNotFoundError:
            head, lines = b"", []
        if not head.endswith(b"\n"):
            return b"", []
        columns = head.decode(errors="replace").strip().split(",")
        if "step" not in columns:
            raise ContentError(f"{self.path} is damaged (line 1 names no step): restore it from a copy")
        rows = [(line, _values(columns, line)) for line in lines]
        while rows and (rows[-1][1] is None or rows[-1][1]["step"] > step):
            rows.pop()
        for number, (_, row) in enumerate(rows, start=2):
            if row is None:
                raise ContentError(
                    f"{self.path} is damaged (line {number}): restore it from a copy, or delete that line"
                )
        return head, [(line, row) for line, row in rows if row is not None and row["step"] <= step]


def _values(columns: list[str], line: bytes) -> dict[str, float] | None:
    """Return the values of a row, or None if it is cut short or damaged."""
    try:
        values = [float(text) for text in line.decode().split(",")]
    except ValueError:
        return None
    is_whole = line.endswith(b"\n") and len(values) == len(columns)
    return dict(zip(columns, values, strict=True)) if is_whole else None


def _line(values: Iterable[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue().encode()
