"""A record as Markdown: a section of results.md."""

from collections.abc import Iterable, Iterator
from statistics import mean
from typing import Any

from tools.experiments.intervals import Interval
from tools.experiments.record import Record, Row


def section(record: Record) -> str:
    """Return the section: tables, remarks, figures, and what reproduces the numbers."""
    parts = [f"## {record.title}", f"Paper: {record.source}. Measured on {record.data}."]
    if record.rows:
        parts.append("\n".join(_measures(record)))
    parts += record.remarks
    if record.sweep:
        parts += [
            "Top-1 errors (%) on held-out training images at the learning rates that were tried, the lowest "
            "of each system in bold:",
            "\n".join(_sweep(record)),
        ]
    parts += [f"![{figure.caption}]({figure.file})\n\n{figure.caption}" for figure in record.figures]
    if record.dataset:
        parts.append(f"The dataset: {listed(record.dataset)}.")
    if record.settings:
        parts.append(f"Settings of all runs, where they are not the defaults: {listed(record.settings)}.")
    if record.runs:
        minutes = sorted(run.minutes for run in record.runs)
        several = f" to {minutes[-1]:.1f} minutes a run, and {sum(minutes) / 60:.1f} hours in all"
        parts.append(f"Training took {minutes[0]:.1f}{several if len(minutes) > 1 else ' minutes'}.")
    return "\n\n".join([*parts, f"`{record.command}` on {listed(record.environment)}."])


def listed(values: dict[str, Any]) -> str:
    """Return names and values as text."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _measures(record: Record) -> Iterator[str]:
    """Yield the lines of a table with a row for each system and measure."""
    yield "| system | measure | published | measured | difference | 95 % interval | |"
    yield "|---|---|---|---|---|---|---|"
    for row in record.rows:
        for number, measure in enumerate(row.measures):
            name = "" if number else f"{row.system}{f' ({row.note})' if row.note else ''}"
            yield f"| {name} | {measure} | {' | '.join(_cells(record, row, measure))} |"


def _cells(record: Record, row: Row, measure: str) -> list[str]:
    """Return the cells: published, measured, difference, its interval or the mean's, and verdict."""
    result = record.result(row, measure)
    signed = result.sign is not None
    return [
        published(row, measure),
        spread(row.values(measure)),
        f"{result.mean:+.2f}" if signed else "",
        bounds(result.interval, signed),
        result.verdict,
    ]


def published(row: Row, measure: str) -> str:
    """Return the published value, difference or sign as text."""
    if measure in row.published:
        value = row.published[measure]
        return f"{value:+g} vs. {row.than}" if row.than else f"{value:g}"
    if measure in row.signs:
        return f"{'higher' if row.signs[measure] > 0 else 'lower'} than {row.than}"
    return ""


def spread(values: list[float]) -> str:
    """Return the mean with the minimum and the maximum, as text."""
    middle = f"{mean(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def bounds(interval: Interval | None, signed: bool) -> str:
    """Return the ends of an interval, as text. signed: with signs, for a difference."""
    form = "+.2f" if signed else ".2f"
    return "" if interval is None else f"{interval.low:{form}} to {interval.high:{form}}"


def _sweep(record: Record) -> Iterator[str]:
    """Yield the lines of a table with a row for each system and a column for each learning rate."""
    rates = sorted({trial.rate for trial in record.sweep})
    yield _line(["system", *(f"{rate:g}" for rate in rates)])
    yield _line(["---"] * (len(rates) + 1))
    for system in dict.fromkeys(trial.system for trial in record.sweep):
        errors = {trial.rate: trial.error for trial in record.sweep if trial.system == system}
        least = min((error for error in errors.values() if error is not None), default=None)
        cells = [_error(errors[rate], least) if rate in errors else "" for rate in rates]
        yield _line([system, *cells])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _error(error: float | None, least: float | None) -> str:
    if error is None:
        return "diverged"
    return f"**{error:.2f}**" if error == least else f"{error:.2f}"
