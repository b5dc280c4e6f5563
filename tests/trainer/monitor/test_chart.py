"""Curves as HTML: places, labels, and values that cannot be drawn."""

import math
import re

import pytest

from trainer.monitor.chart import Line, chart, number, percent


def drawn(html: str) -> list[list[tuple[float, float]]]:
    """Return the points of each curve in SVG units, of which there are 600 × 180."""
    curves = re.findall(r'points="([^"]*)"', html)
    # The last point comes twice, so that a curve with a single point is drawn, too.
    return [[tuple(map(float, point.split(","))) for point in curve.split()[:-1]] for curve in curves]


def labels(html: str, axis: str) -> list[str]:
    return re.findall(r"<span[^>]*>(.*?)</span>", re.search(f'<div class="{axis}".*?</div>', html)[0])


def test_curves_share_axes_that_begin_at_zero():
    html = chart(
        "error", [Line("a", [(1, 0.5), (2, 1.0)], "x"), Line("b", [(0, 0), (4, 0.25)], "y")], percent
    )
    (a, b) = drawn(html)
    top = 1.02  # the highest value is a little below the edge
    assert a == [
        (150, pytest.approx(180 * (1 - 0.5 / top), abs=0.05)),
        (300, pytest.approx(180 - 180 / top, abs=0.05)),
    ]
    assert b == [(0, 180), (600, pytest.approx(180 * (1 - 0.25 / top), abs=0.05))]
    assert labels(html, "x") == ["0", "1", "2", "3", "4"]
    assert labels(html, "y") == ["0%", "20%", "40%", "60%", "80%", "100%"]


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (0.03, ["0%", "1%", "2%", "3%"]),
        (0.79, ["0%", "20%", "40%", "60%"]),
        (1e-9, ["0%", "2e-08%", "4e-08%", "6e-08%", "8e-08%", "1e-07%"]),
    ],
)
def test_labels_are_round_numbers(highest, expected):
    html = chart("error", [Line("a", [(0, highest), (1, 0)], "x")], percent)
    assert labels(html, "y") == expected


def test_values_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, -1.0), (4, 1.0)]
    (curve,) = drawn(chart("loss", [Line("a", points, "x")], number))
    assert [x for x, _ in curve] == [0, 600]


def test_a_long_curve_is_thinned_to_means():
    points = [(x, float(x % 2)) for x in range(3000)]
    (curve,) = drawn(chart("loss", [Line("a", points, "x")], number))
    assert len(curve) == 300
    assert len({y for _, y in curve}) == 1


def test_a_single_point_beside_a_curve_is_a_dot():
    html = chart("error", [Line("a", [(0, 1.0), (2, 1.0)], "x"), Line("b", [(1, 0.51)], "y")], percent)
    assert drawn(html)[1] == [(300, 90)]
    assert 'class="y dot"' in html
    assert 'class="x"' in html


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(0, math.nan), (1, math.nan)]])
def test_too_few_points_are_not_drawn(points):
    assert "not enough data yet" in chart("loss", [Line("a", points, "x")], number)


def test_only_zeros_are_drawn_at_the_bottom():
    assert drawn(chart("error", [Line("a", [(0, 0.0), (1, 0.0)], "x")], percent)) == [[(0, 180), (600, 180)]]


def test_names_are_escaped():
    html = chart("<i>", [Line('"><script>', [(0, 1), (1, 1)], "x")], number)
    assert "<i>" not in html
    assert "<script>" not in html
    assert 'aria-label="&lt;i&gt;: &quot;&gt;&lt;script&gt;"' in html
