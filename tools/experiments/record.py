"""The record of an experiment, as JSON and Markdown: numbers next to the paper's, and pictures."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import atomic_write

TOP1, TOP5 = "top-1 error (%)", "top-5 error (%)"
Measures = dict[str, list[float]]  # measure, named with its unit → a value for each seed


class RecordError(ValueError):
    """A file that is not a record; the message names it."""


class Row(BaseModel):
    """One system. published: the paper's values or, if `than` names a row, differences from that row."""

    model_config = ConfigDict(extra="forbid")

    system: str
    measured: Measures
    published: dict[str, float] = {}
    than: str = ""
    note: str = ""


class Trial(BaseModel):
    """A trial of a learning rate. error: top-1 error on held-out images (%), or None if it diverged."""

    model_config = ConfigDict(extra="forbid")

    system: str
    rate: float
    error: float | None


class Figure(BaseModel):
    """A picture that belongs to the record."""

    model_config = ConfigDict(extra="forbid")

    file: str
    caption: str


class Record(BaseModel):
    """An experiment's results.

    source: where the paper reports it. data: the dataset and budget, in words.
    """

    model_config = ConfigDict(extra="forbid")

    experiment: str
    title: str
    source: str
    data: str
    command: str
    environment: dict[str, str]
    rows: list[Row]
    figures: list[Figure] = []
    remarks: list[str] = []
    sweep: list[Trial] = []

    def save(self, folder: Path) -> Path:
        """Write <experiment>.json to a folder; return its path. Raises OSError."""
        path = folder / f"{self.experiment}.json"
        with atomic_write(path) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")
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
        return next(row for row in self.rows if row.system == system)

    def __str__(self) -> str:
        """Return the record as a section of the report."""
        parts = [f"## {self.title}", f"Paper: {self.source}. Measured on {self.data}."]
        if self.rows:
            parts.append("\n".join(self._table()))
        parts += self.remarks
        parts += [f"![{figure.caption}]({figure.file})\n\n{figure.caption}" for figure in self.figures]
        about = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return "\n\n".join([*parts, f"`{self.command}` on {about}."])

    def _table(self) -> Iterator[str]:
        """Yield the lines of a table with a row for each system and measure."""
        yield "| system | measure | published | measured | difference | |"
        yield "|---|---|---|---|---|---|"
        for row in self.rows:
            for number, measure in enumerate(row.measured):
                name = "" if number else f"{row.system}{f' ({row.note})' if row.note else ''}"
                yield f"| {name} | {measure} | {' | '.join(self._cells(row, measure))} |"

    def _cells(self, row: Row, measure: str) -> list[str]:
        """Return the cells: published, measured, difference from the row it is compared with, and verdict."""
        published, measured = row.published.get(measure), spread(row.measured[measure])
        if not row.than:
            return ["" if published is None else f"{published:g}", measured, "", ""]
        found = differences(row, self.row(row.than), measure)
        if published is None:
            return ["", measured, spread(found, sign=True), ""]
        return [
            f"{published:+g} vs. {row.than}",
            measured,
            spread(found, sign=True),
            verdict(found, published),
        ]


def differences(row: Row, base: Row, measure: str) -> list[float]:
    """Return a row's values minus another's, seed by seed; a single value counts for every seed."""
    ours, theirs = row.measured[measure], base.measured[measure]
    return [a - b for a, b in zip(ours * len(theirs) if len(ours) == 1 else ours, theirs, strict=True)]


def verdict(found: list[float], published: float) -> str:
    """Say whether the differences have the published sign, which only agreement of all seeds decides."""
    if len(found) < 2:
        return "one run"
    if all(value * published > 0 for value in found):
        return "as published"
    return "opposite" if all(value * published < 0 for value in found) else "within the spread"


def spread(values: list[float], sign: bool = False) -> str:
    """Return the mean with the minimum and the maximum, as text."""
    form = "+.2f" if sign else ".2f"
    middle = f"{mean(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"
