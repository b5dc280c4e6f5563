"""Draw curves as HTML: an SVG that fills its box, with labels beside it that stay readable at any width."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 600, 180  # of the plot, in SVG units
_MOST_POINTS = 300  # of a curve; more would not be visible
_LABELS = 5  # the most intervals between the labels of an axis


class Line(NamedTuple):
    """A curve. style: names of its classes in style.css. data: its data attributes, for a script."""

    name: str
    points: Points
    style: str
    data: str = ""


def chart(title: str, lines: Iterable[Line], shown: Callable[[float], str]) -> str:
    """Return a figure with curves over epochs, from 0 to their maxima, without points that are not finite.

    shown: formats a label of the y axis. Without two points on any curve, the figure says so.
    """
    finite = [line._replace(points=_thinned(_finite(line.points))) for line in lines]
    drawn = [line for line in finite if line.points]
    head = f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
    if all(len(line.points) < 2 for line in drawn):
        return f"{head}<p>not enough data yet</p></figure>"
    right = max(x for line in drawn for x, _ in line.points) or 1.0
    highest = max(y for line in drawn for _, y in line.points) or 1.0
    rows, columns = _ticks(highest), _ticks(right)
    top = max(highest, rows[-1]) * 1.02

    def place(x: float, y: float) -> str:
        return f"{x / right * _WIDTH:.1f},{_HEIGHT * (1 - y / top):.1f}"

    grid = "".join(f'<path class="grid" d="M{place(0, y)}H{_WIDTH}"/>' for y in rows)
    curves = "".join(
        f'<polyline class="{line.style}{" dot" if len(line.points) == 1 else ""}" {line.data} '
        f'points="{" ".join(place(*p) for p in [*line.points, line.points[-1]])}">'
        f"<title>{escape(line.name)}</title></polyline>"
        for line in drawn
    )
    y_labels = "".join(f'<span style="top:{100 * (1 - y / top):.1f}%">{shown(y)}</span>' for y in rows)
    x_labels = "".join(f'<span style="left:{100 * x / right:.1f}%">{x:g}</span>' for x in columns)
    label = escape(f"{title}: {', '.join(line.name for line in drawn)}")
    return (
        f'{head}<div class="plot"><div class="y" aria-hidden="true">{y_labels}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{grid}{curves}</svg><div class="x" aria-hidden="true">{x_labels}</div></div>'
        f'<p class="unit">epochs</p></figure>'
    )


def legend(lines: Iterable[Line]) -> str:
    """Return a list of the curves' names, each beside a piece of its line."""
    items = (f"<li>{swatch(line.style)} {escape(line.name)}</li>" for line in lines)
    return f'<ul class="legend">{"".join(items)}</ul>'


def swatch(style: str) -> str:
    """Return a short piece of a line in a style, to put beside its name."""
    return (
        '<svg class="swatch" viewBox="0 0 32 10" aria-hidden="true">'
        f'<path class="{style}" d="M0,5H32"/></svg>'
    )


def percent(value: float) -> str:
    """Format a ratio as a label of an axis."""
    return f"{100 * value:.3g}%"


def number(value: float) -> str:
    """Format a number as a label of an axis."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and x >= 0 and y >= 0]


def _thinned(points: Points) -> Points:
    """Return at most _MOST_POINTS points, each the mean of as many neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    if size < 2:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _ticks(highest: float) -> list[float]:
    """Return round numbers from 0 to at most `highest`, of which there are at most _LABELS + 1."""
    power = 10.0 ** math.floor(math.log10(highest / _LABELS))
    step = next(power * factor for factor in (1, 2, 5, 10) if highest / (power * factor) <= _LABELS)
    return [step * n for n in range(int(highest / step + 1e-9) + 1)]
