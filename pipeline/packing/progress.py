"""Show the progress of a packing run: as a bar on a terminal, otherwise as a line now and then."""

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

_LINE_SECONDS = 10.0
_RATE_SECONDS = 30.0  # the window over which images/s is measured


class Progress:
    """The progress of a run over `total` images, `before` of which were done by earlier runs."""

    def __init__(self) -> None:
        self.total = self.before = 0
        self.counts = Counts()
        self._samples = deque([(time.monotonic(), 0)])  # times, and the number of images done by then
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
        """Set how much there is to do."""
        self.total, self.before = total, before

    def show(self, counts: Counts) -> None:
        """Update the display with what this run has done so far."""
        now = time.monotonic()
        self.counts = counts
        self._samples.append((now, counts.images))
        while now - self._samples[1][0] > _RATE_SECONDS:
            self._samples.popleft()
        self._bar.update(self._task, total=self.total, completed=self.done, description=str(self))
        if self._bar.disable and now >= self._line_due:
            self._line_due = now + _LINE_SECONDS
            print(f"packing: {self}", file=sys.stderr, flush=True)

    @property
    def done(self) -> int:
        return self.before + self.counts.images

    @property
    def images_per_second(self) -> float:
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0

    @property
    def seconds_left(self) -> float:
        """The estimated time left; infinite until a rate is known."""
        rate = self.images_per_second
        return (self.total - self.done) / rate if rate else float("inf")

    def __str__(self) -> str:
        left = f", {duration(self.seconds_left)} left" if self.images_per_second else ""
        return (
            f"{self.done:,} of {self.total:,} images, {self.counts.bytes / 1e6:,.1f} MB, "
            f"{self.counts.rejected:,} rejected, {self.images_per_second:,.0f} images/s{left}"
        )
