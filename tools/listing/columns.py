"""Define what is listed of each run, for the table in the terminal and for the page."""

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.duration import duration
from pipeline.printable import as_text
from trainer.monitor.summary import Row, Summary, changed_settings, shown_setting

Value = str | float  # NaN or an empty string if it is not known
UNKNOWN = "–"


class Column(NamedTuple):
    """A column. name: for --sort. value: what is sorted. shown: how it is shown.

    largest_first: whether the largest value comes first unless the order is reversed.
    """

    name: str
    heading: str
    value: Callable[[Summary], Value]
    shown: Callable[[Value], str] = str
    largest_first: bool = False
    is_text: bool = False

    def text(self, run: Summary) -> str:
        """Return what the column shows for a run."""
        value = self.value(run)
        return self.shown(value) if is_known(value) else UNKNOWN


def is_known(value: Value) -> bool:
    return bool(value) if isinstance(value, str) else math.isfinite(value)


def ordered(runs: Iterable[Summary], column: Column, reverse: bool = False) -> list[Summary]:
    """Sort runs by a column, and by their folders where its values are equal; unknown values come last."""
    by_folder = sorted(runs, key=lambda run: str(run.folder))
    known = [run for run in by_folder if is_known(column.value(run))]
    known.sort(key=column.value, reverse=column.largest_first != reverse)
    return known + [run for run in by_folder if not is_known(column.value(run))]


def _of(row: Row | None, name: str) -> float:
    return math.nan if row is None else row[name]


def _percent(value: Value) -> str:
    return f"{value:.2%}"


def _time(value: Value) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(float(value)))


def _duration(value: Value) -> str:
    return duration(float(value))


def _settings(run: Summary) -> str:
    different = changed_settings(run.recorded).items()
    return as_text(", ".join(f"{name} {shown_setting(value)}" for name, value in different))


# The first ones are the most important: a narrow terminal shows only those.
COLUMNS = (
    Column("run", "run", lambda run: as_text(run.folder), is_text=True),
    Column("best", "best top-1 error", lambda run: _of(run.best, "top1_error"), _percent),
    Column("last", "last top-1 error", lambda run: _of(run.last, "top1_error"), _percent),
    Column("epoch", "epochs done", lambda run: run.epoch, lambda value: f"{value:.2f}", True),
    Column("state", "state", lambda run: run.state, is_text=True),
    Column("rate", "images/s", lambda run: run.images_per_second, lambda value: f"{value:,.1f}", True),
    Column("time", "training time", lambda run: run.training_seconds, _duration, True),
    Column("changed", "last change", lambda run: run.changed, _time, True),
    Column("loss", "validation loss", lambda run: _of(run.last, "loss"), lambda value: f"{value:.3f}"),
    Column(
        "top5",
        "last top-5 error",
        lambda run: _of(run.last, "top5_error") if run.with_top5 else math.nan,
        _percent,
    ),
    Column("recipe", "recipe", lambda run: as_text(run.recipe), is_text=True),
    Column("settings", "changed settings", _settings, is_text=True),
)
BY_NAME = {column.name: column for column in COLUMNS}
