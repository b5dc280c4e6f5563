"""The verdict on an interval at its thresholds."""

import pytest

from trainer.monitor.meter import Interval


@pytest.mark.parametrize(
    ("busy", "ready", "verdict"),
    [
        (1.0, 0.0, "compute-bound"),
        (0.95, 1.0, "compute-bound"),
        (0.94, 0.49, "input-bound"),
        (0.94, 0.5, "mixed"),
        (0.94, 0.94, "mixed"),
        (0.94, 0.95, "host gap"),
    ],
)
def test_the_verdict_follows_from_busy_and_ready(busy, ready, verdict):
    interval = Interval(
        100,
        100,
        loss=1.0,
        error=0.0,
        seconds=4.0,
        wait_seconds=0.0,
        busy_seconds=4 * busy,
        ready=round(100 * ready),
    )
    assert interval.verdict == verdict
