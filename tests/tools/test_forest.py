"""The forest plot of a record: each difference with its interval, and the published one."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tools.experiments.forest import forest
from tools.experiments.record import Record, Row

ERROR = "error (%)"


def record(*rows: Row) -> Record:
    return Record(
        experiment="e", title="t", source="s", data="d", command="c", environment={}, rows=list(rows)
    )


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that have been drawn."""
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def lines(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """Return x and y of each line of a figure, without those of the legend and of zero."""
    [axes] = figure.axes
    found = [
        (np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()).tolist()) for line in axes.lines
    ]
    return [(x, y) for x, y in found[1:] if x]


def test_differences_have_their_intervals(tmp_path, drawn):
    """Five differences of 2, 3, 4, 2 and 3: Student's t with 4 degrees of freedom is 2.776."""
    whole = Row(system="whole", measured={ERROR: [10.0, 11, 12, 13, 14]})
    other = Row(
        system="other", than="whole", measured={ERROR: [12.0, 14, 16, 15, 17]}, published={ERROR: 1.5}
    )
    figure = forest(tmp_path / "a.png", record(whole, other), ERROR)
    half = 2.7764 * np.sqrt(0.7 / 5)
    interval, mean, published = lines(drawn[0])
    assert interval == (pytest.approx([2.8 - half, 2.8 + half], abs=1e-3), [0, 0])
    assert mean == (pytest.approx([2.8]), [0])
    assert published == ([1.5], [0])
    assert (figure.file, "whole" in figure.caption) == ("a.png", True)
    with Image.open(tmp_path / "a.png") as image:
        image.verify()


def test_the_first_system_is_at_the_top_and_one_seed_has_no_interval(tmp_path, drawn):
    rows = [
        Row(system=name, than="whole", measured={ERROR: [value]}) for name, value in (("a", 5.0), ("b", 7))
    ]
    forest(tmp_path / "a.png", record(Row(system="whole", measured={ERROR: [4.0]}), *rows), ERROR)
    assert lines(drawn[0]) == [([1.0], [0]), ([3.0], [1])]
    [axes] = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    bottom, top = axes.get_ylim()
    assert bottom > top
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 >= axes.get_window_extent().y1  # it covers no interval
