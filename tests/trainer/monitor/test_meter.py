"""The verdict on an interval at its thresholds."""

import pytest

from trainer.monitor.meter import Interval


@pytest.mark.parametrize(
    ("busy", "ready", "wait", "storage", "verdict"),
    [
        (1.0, 0.0, 0.5, 0.5, "compute-bound"),
        (0.95, 1.0, 0.5, 0.0, "compute-bound"),
        (0.94, 0.49, 0.05, 0.0, "input-bound"),
        (0.94, 0.49, 0.05, 0.024, "input-bound"),
        (0.94, 0.49, 0.05, 0.025, "storage-bound"),
        (0.94, 0.49, 0.04, 0.04, "mixed"),
        (0.94, 0.5, 0.05, 0.05, "mixed"),
        (0.94, 0.94, 0.05, 0.05, "mixed"),
        (0.94, 0.95, 0.0, 0.0, "host gap"),
    ],
)
def test_the_verdict_follows_from_busy_ready_and_waiting(busy, ready, wait, storage, verdict):
    interval = Interval(
        100,
        100,
        loss=1.0,
        error=0.0,
        seconds=4.0,
        wait_seconds=4 * wait,
        busy_seconds=4 * busy,
        ready=round(100 * ready),
        storage_wait_seconds=4 * storage,
    )
    assert interval.verdict == verdict
