"""Write the report on the records in --out and in its folders: published numbers next to measured ones.

    alexnet-train paper report
    alexnet-train paper report --out docs/results

Each folder with records gets a results.md with all measures, figures, commands and settings. README.md in
--out is the page to read first: what the paper claims, what was measured, and whether they agree. If a folder
has a notes.md, written by hand to say what was not reached and why, its text is on that page, too.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.files import atomic_write
from tools.experiments import EXPERIMENTS
from tools.experiments.markdown import bounds, published, section
from tools.experiments.record import MIN_SEEDS, Record
from trainer.settings import SettingsError

TAKES_SETTINGS = False
DETAILS, FIRST, NOTES = "results.md", "README.md", "notes.md"
TITLE = "# The paper's results, measured"
INTERVAL = (
    "The 95 % interval is that of the difference or, without one, of the mean. For errors of single images, "
    "it allows for other seeds and other images; for measures with one value per seed, for other seeds only. "
    f"`as published` means that there are at least {MIN_SEEDS} seeds and that the whole interval is on the "
    "published side of zero; `opposite`, that it is on the other side. Neither says that the size agrees."
)
LEGEND = f"A value from several seeds is their mean, with the minimum and maximum. {INTERVAL}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this command takes only --out."""


def run(options: argparse.Namespace, _settings: list[str]) -> Path:
    """Write the pages; return the path of the first one.

    Raises RecordError for a file that is not a record, and SettingsError if there are no records.
    """
    pages = report(options.out)
    if not pages:
        raise SettingsError(
            f"no records in {options.out}: run an experiment first, see alexnet-train paper --help"
        )
    for path, text in pages.items():
        with atomic_write(path) as file:
            file.write(text.encode())
    return options.out / FIRST


def report(out: Path) -> dict[Path, str]:
    """Return the text of each page by its path, or nothing if there are no records. Raises RecordError."""
    found = {folder: _records(folder) for folder in (out, *sorted(filter(Path.is_dir, out.iterdir())))}
    found = {folder: records for folder, records in found.items() if records}
    if not found:
        return {}
    pages = {
        folder / DETAILS: _page([TITLE, LEGEND, *map(section, records)]) for folder, records in found.items()
    }
    parts = [part for folder, records in found.items() for part in _first(folder, out, records)]
    return {out / FIRST: _page([TITLE, INTERVAL, *parts]), **pages}


def _records(folder: Path) -> list[Record]:
    paths = [folder / f"{name}.json" for name in EXPERIMENTS]
    return [Record.read(path) for path in paths if path.exists()]


def _page(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _first(folder: Path, out: Path, records: list[Record]) -> Iterator[str]:
    """Yield the parts of the first page on a folder: its claims, the machines, and the notes."""
    details = (folder / DETAILS).relative_to(out).as_posix()
    if folder != out:
        yield f"## {folder.name}"
    lines = [
        "| claim | published | measured | 95 % interval | verdict | details |",
        "|---|---|---|---|---|---|",
    ]
    yield "\n".join([*lines, *(line for record in records for line in _claims(record, details))])
    machines: dict[str, list[str]] = {}
    for record in records:
        machines.setdefault(_machine(record), []).append(record.title)
    for machine, titles in machines.items():
        which = f": {', '.join(titles)}" if len(machines) > 1 else ""
        yield f"Measured on {machine}{which}."
    notes = folder / NOTES
    if notes.exists():
        yield notes.read_text(encoding="utf-8").strip()


def _machine(record: Record) -> str:
    about = record.environment
    cpu = f"{about['cores']} cores ({about['cpu']})"
    return cpu if about["device"].lower() == "cpu" else f"{about['device']} and {cpu}"


def _claims(record: Record, details: str) -> Iterator[str]:
    """Yield a line for each claim or, if a record has none, for each published difference or value."""
    link = f"[{record.title}]({details}#{anchor(record.title)})"
    claims = [(row, measure, text) for row in record.rows for measure, text in row.claims.items()]
    compared = any(row.than for row in record.rows)
    others = [
        (row, measure, row.system)
        for row in record.rows
        for measure in list(row.published)[:1]
        if row.than or not compared
    ]
    for row, measure, text in claims or others:
        compared_with = [record.row(row.than)] if row.than else []
        if all(measure in one.measures for one in (row, *compared_with)):
            result = record.result(row, measure)
            signed = result.sign is not None
            mean = f"{result.mean:{'+.2f' if signed else '.2f'}}"
            found = [mean, bounds(result.interval, signed), result.verdict]
        else:
            found = ["", "", "not reached, see the details"]
        cells = [f"{text}: {measure}", published(row, measure), *found, link]
        yield f"| {' | '.join(cells)} |"


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
