"""The record of an experiment, as JSON: what was measured, what was published, and what reproduces it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import atomic_write
from tools.experiments.intervals import Interval, interval, paired_interval

TOP1, TOP5 = "top-1 error (%)", "top-5 error (%)"
MIN_SEEDS = 5  # for a verdict
Measures = dict[str, list[float]]  # measure, named with its unit → a value for each seed


class RecordError(ValueError):
    """A record, or another file of an experiment, that cannot be read; the message names it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Wrong(_Part):
    """Which images were classified wrongly. seeds: for each seed, hex digits of a bit for each image."""

    images: int
    seeds: list[str]

    @classmethod
    def of(cls, wrong: Sequence[np.ndarray]) -> "Wrong":
        """Pack a bool array [images] for each seed."""
        return cls(images=len(wrong[0]), seeds=[np.packbits(own).tobytes().hex() for own in wrong])

    def percent(self) -> np.ndarray:
        """Return the error of each seed and image, 0 or 100: float64 [seeds,images]."""
        packed = np.stack([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in self.seeds])
        return 100.0 * np.unpackbits(packed, axis=1, count=self.images)


class Row(_Part):
    """One system.

    measured: values for each seed. wrong: errors, in percent, of each seed and image. gaps: measures that are
    the first of two other measures minus the second. published: the paper's values or, if `than` names a row,
    differences from that row. signs: published signs of differences, where the paper gives no value. claims:
    what the paper says about some of the measures, for the first page.
    """

    system: str
    measured: Measures = {}
    wrong: dict[str, Wrong] = {}
    gaps: dict[str, tuple[str, str]] = {}
    published: dict[str, float] = {}
    signs: dict[str, Literal[-1, 1]] = {}
    than: str = ""
    note: str = ""
    claims: dict[str, str] = {}

    @property
    def measures(self) -> list[str]:
        return [*self.wrong, *self.measured, *self.gaps]

    def table(self, measure: str) -> np.ndarray:
        """Return the measure for each seed and image [seeds,images]; a seed's only value is one column."""
        if measure in self.gaps:
            first, second = self.gaps[measure]
            return self.table(first) - self.table(second)
        if measure in self.wrong:
            return self.wrong[measure].percent()
        return np.array(self.measured[measure])[:, None]

    def values(self, measure: str) -> list[float]:
        """Return the measure for each seed."""
        return self.table(measure).mean(1).tolist()


class Trial(_Part):
    """A trial of a learning rate. error: top-1 error on held-out images (%), or None if it diverged."""

    system: str
    rate: float
    error: float | None


class TrainedRun(_Part):
    """A training run. settings: those in which it differs from other runs. minutes: of training steps."""

    name: str
    seed: int
    settings: dict[str, Any]
    minutes: float


class Figure(_Part):
    """A picture that belongs to the record."""

    file: str
    caption: str


class Record(_Part):
    """An experiment's results.

    source: where the paper reports it. data: the dataset and budget, in words. dataset: its fingerprint and
    how it was packed. settings: those of all runs that are not the defaults, and the precision that was used.
    sweep: the learning rates that were tried.
    """

    experiment: str
    title: str
    source: str
    data: str
    command: str
    environment: dict[str, str]
    rows: list[Row]
    figures: list[Figure] = []
    remarks: list[str] = []
    dataset: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    runs: list[TrainedRun] = []
    sweep: list[Trial] = []

    def save(self, folder: Path) -> Path:
        """Write <experiment>.json to a folder; return its path. Raises OSError."""
        path = folder / f"{self.experiment}.json"
        with atomic_write(path) as file:
            file.write(self.model_dump_json(indent=1, exclude_defaults=True).encode() + b"\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a record. Raises RecordError if the file is not one."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise RecordError(
                f"{path} is not a record ({error.errors()[0]['msg']}): delete it and run the experiment again"
            ) from None

    def row(self, system: str) -> Row:
        """Return a system's row. Raises RecordError if there is none."""
        for row in self.rows:
            if row.system == system:
                return row
        raise RecordError(f"{self.experiment}.json has no row '{system}': run the experiment again")

    def result(self, row: Row, measure: str) -> "Result":
        """Return a row's measure or, if the row and the one it is compared with have it, their difference."""
        table = row.table(measure)
        if not row.than or measure not in self.row(row.than).measures:
            return Result(table, None)
        sign = np.sign(row.published.get(measure, row.signs.get(measure, 0)))
        return Result(table - self.row(row.than).table(measure), int(sign))


class Result(NamedTuple):
    """A measure or a difference for each seed and image [seeds,images].

    sign: the published sign of a difference, 0 if none is published, or None if this is no difference.
    """

    table: np.ndarray
    sign: int | None

    @property
    def mean(self) -> float:
        return float(self.table.mean())

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean, or None for a single seed."""
        seeds, images = self.table.shape
        if seeds == 1:
            return None
        return interval(self.table[:, 0]) if images == 1 else paired_interval(self.table)

    @property
    def verdict(self) -> str:
        """Whether the difference has the published sign, or nothing if none is published."""
        if not self.sign:
            return ""
        if self.interval is None or len(self.table) < MIN_SEEDS:
            return "fewer than five seeds"
        _, low, high = self.interval
        if low <= 0 <= high:
            return "inconclusive: the interval includes 0"
        return "as published" if low * self.sign > 0 else "opposite"
