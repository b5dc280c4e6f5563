"""Write runs as one HTML page with a sortable table and curves. It loads nothing, and opens as a file."""

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.printable import as_text
from tools.listing.columns import COLUMNS, Column, is_known
from trainer.monitor.chart import Line, chart, number, percent, swatch
from trainer.monitor.summary import Summary
from trainer.monitor.templates import template

_COLOURS = 8  # classes c0, c1, … in style.css
_DASHES = ("", "dashed", "dotted")
_DRAWN = 10  # number of runs whose curves are visible at first


def page(runs: Sequence[Summary], problems: Sequence[str], sorted_by: Column, reverse: bool) -> str:
    """Return the page. problems: lines about runs that cannot be read."""
    heads = "".join(_head(column, sorted_by, reverse) for column in COLUMNS)
    rows = "\n".join(f"<tr>{''.join(_cell(c, run, n) for c in COLUMNS)}</tr>" for n, run in enumerate(runs))
    notes = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return template(Path(__file__).with_name("runs.html")).substitute(
        count=f"{len(runs):,} run{'s' if len(runs) != 1 else ''}",
        made=escape(time.strftime("%Y-%m-%d %H:%M %Z")),
        heads=heads,
        rows=rows,
        charts="\n".join(_charts(runs)),
        problems=f"<section><h2>not read</h2><ul>{notes}</ul></section>" if problems else "",
    )


def _head(column: Column, sorted_by: Column, reverse: bool) -> str:
    direction = "none"
    if column is sorted_by:
        direction = "descending" if column.largest_first != reverse else "ascending"
    first = "descending" if column.largest_first else "ascending"
    heading = escape(column.heading).replace("-", "&#8209;")  # no line may end within top-1
    return (
        f'<th scope="col" class="{"text" if column.is_text else "number"}" aria-sort="{direction}">'
        f'<button type="button" data-first="{first}">{heading}</button></th>'
    )


def _cell(column: Column, run: Summary, index: int) -> str:
    value, text = column.value(run), escape(column.text(run))
    known = f' data-value="{escape(str(value))}"' if is_known(value) else ""
    if column.name == "run":
        checked = " checked" if index < _DRAWN else ""
        box = f'<input type="checkbox" data-run="{index}"{checked}>'
        name = f'<span class="name">{text.replace("/", "/<wbr>")}</span>'
        return f'<th scope="row"{known}><label>{box} {swatch(_style(index))} {name}</label></th>'
    return f'<td class="{"text" if column.is_text else "number"}"{known}>{text}</td>'


def _charts(runs: Sequence[Summary]) -> list[str]:
    measures = [
        ("validation top-1 error", "evaluations", "top1_error", percent),
        ("training loss", "steps", "loss", number),
        ("images/s", "steps", "images_per_second", number),
    ]
    return [
        chart(
            title,
            [
                Line(
                    as_text(run.folder),
                    [(row["epoch"], row[column]) for row in getattr(run, rows)],
                    f"{_style(index)}{'' if index < _DRAWN else ' off'}",
                    f'data-run="{index}"',
                )
                for index, run in enumerate(runs)
            ],
            shown,
        )
        for title, rows, column, shown in measures
    ]


def _style(index: int) -> str:
    return f"c{index % _COLOURS} {_DASHES[index // _COLOURS % len(_DASHES)]}".rstrip()
