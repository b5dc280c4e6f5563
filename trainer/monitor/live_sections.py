"""The sections of the live page about evaluations: the last and the best, an earlier run, errors by class."""

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.printable import as_text
from trainer.monitor.chart import Line, chart, legend, percent
from trainer.monitor.comparison import Earlier
from trainer.monitor.live_data import ErrorsByClass, LiveData
from trainer.monitor.meter import Interval
from trainer.monitor.summary import Row, best_of, row_at

_CLASSES = 20  # the most classes that are shown


def sections(live: LiveData, with_top5: bool, epoch: float, last: Interval | None) -> str:
    """Return the sections for which there is data. epoch: epochs done. last: the last log interval."""
    parts = []
    evaluations, earlier = live.evaluations, live.earlier
    if evaluations or earlier:
        parts.append(_errors_by_epoch(evaluations, earlier))
    if evaluations:
        parts.append(_evaluations(evaluations, with_top5))
    if earlier:
        parts.append(_comparison(evaluations, earlier, epoch, last))
    if live.class_errors:
        parts.append(_classes(live.class_errors, live.names))
    return "\n".join(parts)


def _errors_by_epoch(evaluations: Sequence[Row], earlier: Earlier | None) -> str:
    lines = [Line("this run", _points(evaluations), "this")]
    if earlier:
        name = as_text(earlier.summary.folder.name)
        lines.insert(0, Line(name, _points(earlier.summary.evaluations), "earlier"))
    drawn = chart("validation top-1 error", lines, percent)
    return f"<section>{drawn}{legend(lines[::-1]) if earlier else ''}</section>"


def _points(evaluations: Iterable[Row]) -> list[tuple[float, float]]:
    return [(row["epoch"], row["top1_error"]) for row in evaluations]


def _evaluations(evaluations: Sequence[Row], with_top5: bool) -> str:
    columns = {
        "after": lambda row: f"{row['epoch']:.2f} epochs",
        "top-1 error": lambda row: f"{row['top1_error']:.2%}",
        "top-5 error": lambda row: f"{row['top5_error']:.2%}",
        "loss": lambda row: f"{row['loss']:.3f}",
    }
    if not with_top5:
        del columns["top-5 error"]
    rows = {"last": evaluations[-1], "best": best_of(evaluations)}
    return _section(
        "evaluations",
        "evaluation",
        columns,
        {name: [shown(row) for shown in columns.values()] for name, row in rows.items() if row},
    )


def _comparison(evaluations: Sequence[Row], earlier: Earlier, epoch: float, last: Interval | None) -> str:
    """Compare with the earlier run at the same epoch, because its end would be no fair comparison before."""
    theirs = earlier.summary
    rows: dict[str, Sequence[str]] = {}
    if last is not None and (row := row_at(epoch, theirs.steps)):
        rows[f"training loss after {epoch:.2f} epochs"] = f"{last.loss:.3f}", f"{row['loss']:.3f}"
    if evaluations and (row := row_at(evaluations[-1]["epoch"], theirs.evaluations)):
        ours = evaluations[-1]
        when = f"{ours['epoch']:.2f} epochs"
        if abs(ours["epoch"] - row["epoch"]) > 0.01:
            when += f" (earlier run: {row['epoch']:.2f})"
        rows[f"top-1 error after {when}"] = f"{ours['top1_error']:.2%}", f"{row['top1_error']:.2%}"
    if theirs.best:
        best = best_of(evaluations)
        after = f"{theirs.best['top1_error']:.2%}, after {theirs.best['epoch']:.2f} epochs"
        rows["best top-1 error"] = f"{best['top1_error']:.2%}" if best else "–", after
    if theirs.steps:
        here = f"{last.images_per_second:,.1f}" if last else "–"
        rows["images/s (earlier run: median)"] = here, f"{theirs.images_per_second:,.1f}"
    name = as_text(theirs.folder.name)
    differing = f"Here, {earlier.differing}." if earlier.differing else "Its settings are the same."
    note = f"{as_text(theirs.folder)}: recipe {theirs.recipe}, {theirs.state}. {differing}"
    return _section(f"compared with {name}", "measure", ["this\u00a0run", "earlier\u00a0run"], rows, note)


def _classes(found: ErrorsByClass, names: Sequence[str]) -> str:
    """Show the classes with the highest errors; of equal errors, the class with more images comes first."""
    tested = [
        (errors / images, images, label)
        for label, (images, errors) in enumerate(zip(found.images, found.errors, strict=True))
        if images
    ]
    worst = sorted(tested, key=lambda each: (-each[0], -each[1], each[2]))[:_CLASSES]
    all_shown = len(worst) == len(tested)
    which = "by class" if all_shown else f"of the {len(worst)} worst of {len(tested):,} classes"
    rows = "".join(
        f'<tr><th scope="row" class="name">{escape(names[label])}</th>'
        f'<td><div style="width:{error:.1%}"></div></td><td>{error:.1%} of {images:,}</td></tr>'
        for error, images, label in worst
    )
    return (
        f'<section class="classes"><h2>errors {which}, after {found.epoch:.2f} epochs</h2><table><thead><tr>'
        '<th scope="col">class</th><td></td><th scope="col">top-1 error</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _section(
    title: str, corner: str, columns: Iterable[str], rows: dict[str, Sequence[str]], note: str = ""
) -> str:
    """Return a section with a table. rows: the cells of each row by the name of the row."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in (corner, *columns))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    below = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<section><h2>{escape(title)}</h2><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table>{below}</section>"
    )
