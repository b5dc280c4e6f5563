"""Print the progress of a run: as a progress bar on a terminal, and as plain lines elsewhere."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.duration import duration

if TYPE_CHECKING:  # these modules import torch, which takes seconds
    from trainer.evaluate import Scores
    from trainer.monitor.meter import Interval


class Display:
    """Shows the progress of a run.

    steps: number of steps of the whole run. done: number of steps done so far. silent: whether only warnings
    are printed, as in all processes but the first.
    """

    def __init__(self, steps: int, done: int, silent: bool = False):
        self.steps, self.silent = steps, silent
        console = Console()  # on standard output, like the lines
        live = sys.stdout.isatty() and not console.is_dumb_terminal and not silent
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not live,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("", total=steps, completed=done, epoch=0.0, text="starting")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line, unless the display is silent."""
        if not self.silent:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print a line, even if the display is silent."""
        if self._progress.disable:
            print(text, flush=True)
        else:
            self._progress.console.print(text, highlight=False, markup=False)

    def show_interval(self, step: int, epoch: float, learning_rate: float, interval: "Interval") -> None:
        """Show a log interval that ended after `step` steps and `epoch` epochs."""
        text = (
            f"loss {interval.loss:.3f}  error {interval.error:.1%}  "
            f"{interval.images_per_second:,.1f} images/s  input wait {interval.wait_ratio:.1%}"
        )
        self._progress.update(self._task, completed=step, epoch=epoch, text=text)
        if self._progress.disable:
            left = duration((self.steps - step) * interval.seconds / interval.steps)
            self.say(
                f"epoch {epoch:.2f}  step {step}/{self.steps}  {text}  rate {learning_rate:.2g}  {left} left"
            )

    def show_evaluation(self, epoch: float, scores: "Scores", with_top5: bool) -> None:
        """Show the result of an evaluation after `epoch` epochs."""
        top5 = f"top-5 error {scores.top5_error:.1%}, " if with_top5 else ""
        self.say(
            f"epoch {epoch:.2f}  validation: top-1 error {scores.top1_error:.1%}, {top5}"
            f"loss {scores.loss:.3f} over {scores.images:,} images"
        )
