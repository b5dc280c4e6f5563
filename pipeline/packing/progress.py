"""Show the progress of a packing run: as a bar on a terminal, and otherwise as a line every ten seconds."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from pipeline.duration import duration
from pipeline.packing.executors import Counts
from pipeline.packing.remarks import Remarks

_LINE_SECONDS = 10.0
_RATE_SECONDS = 30.0  # the window over which images/s is measured


class Progress:
    """The progress of a run over `total` images, of which earlier runs processed `before`.

    counts: what this run has done so far. remarks: about the dataset, once it is complete.
    """

    def __init__(self) -> None:
        self.total = self.before = 0
        self.counts = Counts()
        self.remarks = Remarks()
        self._history = deque([(time.monotonic(), 0)])  # times, and the number of images processed by then
        self._line_due = time.monotonic() + _LINE_SECONDS
        self._bar = Bar(
            TextColumn("packing"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, total: int, before: int) -> None:
        """Set the number of images of the dataset, and how many of them earlier runs processed."""
        self.total, self.before = total, before

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        print(f"make-shards: {text}", file=sys.stderr, flush=True)

    def show(self, counts: Counts) -> None:
        """Update the display. counts: what this run has done so far."""
        now = time.monotonic()
        self.counts = counts
        self._history.append((now, counts.images))
        while now - self._history[1][0] > _RATE_SECONDS:
            self._history.popleft()
        self._bar.update(self._task, total=self.total, completed=self.done, description=str(self))
        if self._bar.disable and now >= self._line_due:
            self._line_due = now + _LINE_SECONDS
            print(f"packing: {self}", file=sys.stderr, flush=True)

    @property
    def done(self) -> int:
        """The number of images processed by this run and earlier ones."""
        return self.before + self.counts.images

    @property
    def images_per_second(self) -> float:
        """The rate over the last half minute, or 0 until it is known."""
        (start, first), (end, last) = self._history[0], self._history[-1]
        return (last - first) / (end - start) if end > start else 0.0

    @property
    def seconds_left(self) -> float:
        """The estimated time left, which is infinite until the rate is known."""
        rate = self.images_per_second
        return (self.total - self.done) / rate if rate else float("inf")

    def __str__(self) -> str:
        left = f", {duration(self.seconds_left)} left" if self.images_per_second else ""
        return (
            f"{self.done:,} of {self.total:,} images, {self.counts.bytes / 1e6:,.1f} MB, "
            f"{self.counts.rejected:,} rejected, {self.images_per_second:,.0f} images/s{left}"
        )
