"""What an experiment leaves, as JSON and as Markdown: numbers beside the paper's, and pictures."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import atomic_write

TOP1, TOP5 = "top-1 error (%)", "top-5 error (%)"
Measures = dict[str, list[float]]  # of each measure, named with its unit, a value a seed


class RecordError(ValueError):
    """A file that holds no record; the message names it."""


class Row(BaseModel):
    """One system. published: the paper's values, or where `than` names a row, its differences to that."""

    model_config = ConfigDict(extra="forbid")

    system: str
    measured: Measures
    published: dict[str, float] = {}
    than: str = ""
    note: str = ""


class Figure(BaseModel):
    """A picture beside the record."""

    model_config = ConfigDict(extra="forbid")

    file: str
    caption: str


class Record(BaseModel):
    """source: where the paper has it. data: what it was measured on, and with what budget, in words."""

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

    def save(self, folder: Path) -> Path:
        """Write <experiment>.json; returns its path. Raises OSError."""
        path = folder / f"{self.experiment}.json"
        with atomic_write(path) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises RecordError where the file is no record."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise RecordError(
                f"{path} is no record ({error.errors()[0]['msg']}): delete it and run the experiment again"
            ) from None

    def row(self, system: str) -> Row:
        return next(row for row in self.rows if row.system == system)

    def __str__(self) -> str:
        """A section of the report."""
        parts = [f"## {self.title}", f"Paper: {self.source}. Measured on {self.data}."]
        if self.rows:
            parts.append("\n".join(self._table()))
        parts += self.remarks
        parts += [f"![{figure.caption}]({figure.file})\n\n{figure.caption}" for figure in self.figures]
        about = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        return "\n\n".join([*parts, f"`{self.command}` on {about}."])

    def _table(self) -> Iterator[str]:
        """A line a system and measure."""
        yield "| system | measure | published | measured | difference | |"
        yield "|---|---|---|---|---|---|"
        for row in self.rows:
            for number, measure in enumerate(row.measured):
                name = "" if number else f"{row.system}{f' ({row.note})' if row.note else ''}"
                yield f"| {name} | {measure} | {' | '.join(self._cells(row, measure))} |"

    def _cells(self, row: Row, measure: str) -> list[str]:
        """Published, measured, difference to the row that it is compared with, and what that says."""
        published, measured = row.published.get(measure), spread(row.measured[measure])
        if not row.than:
            return ["" if published is None else f"{published:g}", measured, "", ""]
        found = differences(row, self.row(row.than), measure)
        if published is None:
            return ["", measured, spread(found, sign=True), ""]
        return [
            f"{published:+g} to {row.than}",
            measured,
            spread(found, sign=True),
            verdict(found, published),
        ]


def differences(row: Row, base: Row, measure: str) -> list[float]:
    """By how much a row is above another, seed by seed; one value is compared with each of the other's."""
    ours, theirs = row.measured[measure], base.measured[measure]
    return [a - b for a, b in zip(ours * len(theirs) if len(ours) == 1 else ours, theirs, strict=True)]


def verdict(found: list[float], published: float) -> str:
    """Whether differences have the published sign: only where all seeds agree is it said."""
    if len(found) < 2:
        return "one run"
    if all(value * published > 0 for value in found):
        return "as published"
    return "opposite" if all(value * published < 0 for value in found) else "within the spread"


def spread(values: list[float], sign: bool = False) -> str:
    """The mean, with the least and the greatest."""
    form = "+.2f" if sign else ".2f"
    middle = f"{mean(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"
