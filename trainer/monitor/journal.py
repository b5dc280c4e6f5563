"""Report each log interval and evaluation to the log, Prometheus, Kubeflow and the tables of the run folder.

Every process has its own metrics; only the main process writes the log and the tables.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline import Dataset
from pipeline.manifest import Manifest
from pipeline.serving import url_host
from trainer.evaluate import PROTOCOLS
from trainer.monitor.comparison import find_earlier
from trainer.monitor.display import Display
from trainer.monitor.live_data import ErrorsByClass
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.monitor.names import plain_names
from trainer.monitor.summary import TOP5_CLASSES
from trainer.monitor.trainjob import TrainJob
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings
from trainer.validation import Validated

if TYPE_CHECKING:
    from trainer.monitor.tensorboard import EventFile  # its package is optional

_NAME = 40  # the most characters of a class's name on the live page


class Journal:
    """Reports the start, the log intervals, the evaluations and an early end of one run.

    tensorboard: whether to write the rows of the tables as TensorBoard's events, too.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        metrics: Metrics,
        display: Display,
        dataset: Dataset,
        tensorboard: bool = False,
    ):
        self.run, self.world, self.metrics, self.display = run, world, metrics, display
        self.trainjob = TrainJob(display.steps, display.warn, silent=not world.is_main)
        self.dataset = dataset
        self.shows_top5 = len(dataset.manifest.classes) >= TOP5_CLASSES
        self.tables = {"train": run.metrics, "eval": run.evaluations}
        self.tensorboard = tensorboard
        self.events: EventFile | None = None
        self.live = metrics.live
        self.live.names = plain_names(dataset.manifest.classes, _NAME)

    def log_start(
        self, settings: Settings, manifest: Manifest, precision: str, port: int | None, notes: Iterable[str]
    ) -> None:
        """Log what is trained, on which data and hardware, and record it as the run's environment.

        port: that of the metrics server, if there is one. notes: further lines for the log.
        """
        name = self.world.device_name
        if self.world.is_main:
            description = {"run": str(self.run.folder), "recipe": settings.recipe, "precision": precision}
            self.metrics.describe(description | self.run.record_environment(name))
            self.live.earlier, problem = find_earlier(self.run, settings)
            notes = [*notes, problem] if problem else notes
        train, val = (manifest.split(split).samples for split in ("train", "val"))
        self.display.say(
            f"{self.run.folder}: recipe {settings.recipe}, {train:,} training and {val:,} validation "
            f"images in {len(manifest.classes):,} classes, on {self.world.size} × {name} in {precision}"
        )
        if port is not None:
            self.display.say(f"live page: http://{url_host(settings.address)}:{port}/, metrics: /metrics")
        for note in notes:
            self.display.say(note)

    def rewind_to(self, step: int) -> list[dict[str, float]]:
        """Drop the rows of steps after `step` from the tables, because these steps will be repeated.

        Returns the remaining rows of metrics.csv, or an empty list in all processes but the main one.
        """
        evaluations = None
        if self.world.is_main:
            for table in self.tables.values():
                table.truncate(step)
            if self.tensorboard:
                from trainer.monitor.tensorboard import EventFile

                hidden = () if self.shows_top5 else ("top5_error",)
                self.events = EventFile(self.run.folder / "tensorboard", self.tables, hidden)
            evaluations = self.run.evaluations.rows()
        self.live.evaluations = self.world.broadcast(evaluations)
        for row in self.live.evaluations[-1:]:
            self._export(row["loss"], row["top1_error"], row["top5_error"])
        return self.run.metrics.rows() if self.world.is_main else []

    def record_interval(
        self, step: int, epoch: float, learning_rate: float, scale: float, interval: Interval
    ) -> None:
        """Report a log interval that ended after `step` steps. scale: the loss scale in fp16, otherwise 1."""
        self.metrics.record_interval(interval, learning_rate, scale, self.world.device)
        if self.world.is_main:
            row = {"step": step, "epoch": epoch, "loss": interval.loss, "error": interval.error}
            row |= {"learning_rate": learning_rate, "images_per_second": interval.images_per_second}
            self._append("train", row | {"wait_ratio": interval.wait_ratio})
        self.display.show_interval(step, epoch, learning_rate, interval)
        self.trainjob.show_interval(step, learning_rate, interval)

    def record_evaluation(self, step: int, epoch: float, result: Validated) -> None:
        """Report an evaluation on the validation set after `step` steps. Raises OSError."""
        scores = result.scores
        row = {"step": step, "epoch": epoch, **asdict(scores)}
        self._export(scores.loss, scores.top1_error, scores.top5_error)
        self.live.class_errors = ErrorsByClass(epoch, *result.by_class)
        self.live.evaluations = [*self.live.evaluations, row]
        if self.world.is_main:
            self._append("eval", row)
            if result.details is not None:
                classes, reader = self.dataset.manifest.classes, self.dataset.reader("val")
                result.details.write(self.run.folder, classes, reader)
        self.display.show_evaluation(epoch, scores, self.shows_top5)
        self.trainjob.show_evaluation(scores, self.shows_top5)

    def _append(self, table: str, row: Mapping[str, Any]) -> None:
        self.tables[table].append(row)
        if self.events is not None:
            self.events.append(table, row)

    def _export(self, loss: float, top1_error: float, top5_error: float) -> None:
        top5 = top5_error if self.shows_top5 else None
        self.metrics.record_evaluation(PROTOCOLS[1], loss=loss, top1_error=top1_error, top5_error=top5)

    def log_early_end(self, epoch: float, settings: Settings) -> None:
        """Log that --stop-after has ended the run after `epoch` epochs."""
        self.display.say(
            f"epoch {epoch:.2f}  stopped early: "
            f"{settings.stop_after} evaluations without a lower validation error"
        )
