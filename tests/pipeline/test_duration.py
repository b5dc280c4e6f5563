"""Durations as people read them."""

import pytest

from pipeline.duration import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (13.4, "13 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")],
)
def test_a_duration_has_at_most_two_units(seconds, text):
    assert duration(seconds) == text
