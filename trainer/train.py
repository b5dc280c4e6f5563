"""The training loop, top to bottom: section 5 of the paper around the loader, the net and the metrics."""

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.loader import Batch, Dataset, evaluation_loader, train_loader
from pipeline.plan import Plan
from trainer import checkpoint, distributed
from trainer.build import build_decoding, build_model
from trainer.display import Display
from trainer.distributed import World
from trainer.evaluate import PROTOCOLS, evaluate
from trainer.meter import Meter
from trainer.metrics import Metrics, MetricsServer
from trainer.optim import learning_rate, make_optimizer, set_learning_rate
from trainer.run import Run
from trainer.settings import Settings, SettingsError
from trainer.step import Step, resolve_precision


def train(settings: Settings, run: Run) -> None:
    """Train as the settings say, or continue the run that is in the folder, and write its report.

    Raises SettingsError, DatasetError, RunError or OSError with a message for people.
    """
    world = distributed.join(settings.device)
    server = None
    try:
        metrics = Metrics()
        with metrics.activity("start-up"):
            server = serve(metrics, settings, world)
            trainer = Trainer(settings, run, world, metrics, server.port if server else None)
        trainer.run_to_end()
    finally:
        if server is not None:
            server.close()
        distributed.leave()


def serve(metrics: Metrics, settings: Settings, world: World) -> MetricsServer | None:
    """Start the metrics server. Raises SettingsError if its port is taken."""
    if settings.port == 0:
        return None
    port = settings.port + world.local_rank
    try:
        return MetricsServer(metrics, settings.address, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise SettingsError(f"--address {settings.address} --port {port}: {error.strerror}") from error
        raise SettingsError(
            f"port {port} is in use: choose another with --port, or 0 for no metrics"
        ) from error


class Trainer:
    """A run between two of its steps."""

    def __init__(self, settings: Settings, run: Run, world: World, metrics: Metrics, port: int | None):
        self.settings, self.run, self.world = settings, run, world
        self.metrics, self.port = metrics, port
        self.dataset = Dataset(settings.data)
        self.plan = Plan(
            seed=settings.seed,
            batch=settings.batch,
            shard_samples=tuple(shard.samples for shard in self.dataset.manifest.split("train").shards),
            window=settings.shuffle_window,
        )
        for split in ("train", "val"):
            self.dataset.reader(split)  # damage is found now, not in an hour
        self.decoding = build_decoding(settings, world.device)
        self.steps = self.plan.steps(settings.epochs)
        self.step = 0
        self.errors: list[float] = []  # validation top-1, an epoch each

        self.model = build_model(settings, len(self.dataset.manifest.classes), world.device)
        self.optimizer = make_optimizer(self.model, settings)
        self.precision = resolve_precision(settings.precision, world.device)
        trained: Callable[[Tensor], Tensor] = self.model
        if world.size > 1:
            trained = DistributedDataParallel(self.model)
        if settings.compile:
            trained = torch.compile(trained)
        self.train_step = Step(trained, self.optimizer, self.precision, world.device)
        self.meter = Meter(world)
        self.notes = self._resume()
        self.display = Display(self.steps, self.step, silent=not world.is_main)

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps, with the fraction."""
        return step * self.plan.batch / self.plan.samples

    def _epochs_done(self, step: int) -> int:
        return step * self.plan.batch // self.plan.samples

    def run_to_end(self) -> None:
        with self.display:
            self._introduce()
            batches = self.batches()
            while self.step < self.steps:
                with self.metrics.activity("train"):
                    self.train_one(batches)
                epoch_ends = self._epochs_done(self.step) > self._epochs_done(self.step - 1)
                checkpoint_due = (
                    self.settings.checkpoint_steps and self.step % self.settings.checkpoint_steps == 0
                )
                if epoch_ends or checkpoint_due or self.step % self.settings.log_every == 0:
                    self._log()
                if epoch_ends:
                    self._evaluate()
                if epoch_ends or checkpoint_due:
                    self._save()
            if self.world.is_main:
                from trainer.report import write_report

                self.display.say(f"done: {write_report(self.run, self.dataset.manifest)}")

    def batches(self) -> Iterator[Batch]:
        """This process's part of all steps that are left."""
        return train_loader(
            self.dataset,
            self.plan,
            range(self.step, self.steps),
            self.decoding,
            colour=self.settings.colour,
            colour_epochs=self.settings.colour_epochs,
            rank=self.world.rank,
            world=self.world.size,
        )

    def train_one(self, batches: Iterator[Batch]) -> None:
        """One step: wait for the batch, set the learning rate, update."""
        begun = time.monotonic()
        pixels, labels = next(batches)
        waited = time.monotonic() - begun
        epoch = self.epoch_at(self.step + 1)
        self.learning_rate = learning_rate(self.settings, epoch, self.errors)
        set_learning_rate(self.optimizer, self.learning_rate, epoch)
        # Dropout depends on the place in the run alone, so a resume has no state of it to restore.
        place = np.random.SeedSequence((self.settings.seed, self.step, self.world.rank))
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

        self.meter.begin_step()
        loss, wrong = self.train_step(pixels, labels)
        self.meter.end_step(loss, wrong, len(labels))
        self.step += 1

        self.meter.waited(waited)
        self.metrics.input_wait_seconds["train"].observe(waited)
        self.metrics.step_seconds["train"].observe(time.monotonic() - begun)
        self.metrics.images["train"].inc(len(labels))
        self.metrics.step.set(self.step)
        self.metrics.epoch.set(self.epoch_at(self.step))
        self.metrics.progress_ratio.set(self.step / self.steps)
        self.metrics.progress()

    def _log(self) -> None:
        """Fetch what the device has summed up, and show it everywhere."""
        interval = self.meter.harvest()
        epoch = self.epoch_at(self.step)
        self.metrics.harvested(
            interval, self.learning_rate, self.train_step.scaler.get_scale(), self.world.device
        )
        if self.world.is_main:
            row = {"step": self.step, "epoch": epoch, "loss": interval.loss, "error": interval.error}
            row |= {"learning_rate": self.learning_rate, "images_per_second": interval.images_per_second}
            self.run.metrics.append(row | {"wait_ratio": interval.wait_ratio})
        self.display.interval(self.step, epoch, self.learning_rate, interval)

    def _evaluate(self) -> None:
        """Errors over the whole validation set, centre crop."""
        with self.metrics.activity("eval"):
            batches = evaluation_loader(
                self.dataset,
                "val",
                self.settings.evaluation_batch,
                self.decoding,
                rank=self.world.rank,
                world=self.world.size,
            )
            scores = evaluate(self.model, self.precision, batches, self.world, self.metrics)
        self.errors.append(scores.top1_error)
        self.metrics.evaluated(
            PROTOCOLS[1], loss=scores.loss, top1_error=scores.top1_error, top5_error=scores.top5_error
        )
        if self.world.is_main:
            self.run.evaluations.append(
                {"step": self.step, "epoch": self.epoch_at(self.step), **asdict(scores)}
            )
        self.display.scores(self.epoch_at(self.step), scores)
        self.meter.restart()

    def _save(self) -> None:
        with self.metrics.activity("checkpoint"):
            if self.world.is_main:
                state = {
                    "step": self.step,
                    "errors": self.errors,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.train_step.scaler.state_dict(),
                }
                with self.metrics.checkpoint_seconds.time():
                    checkpoint.save(self.run.checkpoints, self.step, state, self.settings.keep_checkpoints)
                self.metrics.checkpoint_timestamp.set_to_current_time()
        self.meter.restart()

    def _resume(self) -> list[str]:
        """Take up the newest good checkpoint, if there is one; returns what there is to say of it."""
        state, notes = checkpoint.load_newest(self.run.checkpoints, self.world.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.train_step.scaler.load_state_dict(state["scaler"])
            self.step, self.errors = state["step"], state["errors"]
            notes.append(
                f"continuing {self.run.folder} after step {self.step}, epoch {self.epoch_at(self.step):.2f}"
            )
        if self.world.is_main:
            self.run.metrics.truncate(self.step)
            self.run.evaluations.truncate(self.step)
        return notes

    def _introduce(self) -> None:
        """Say what runs on what, and export it."""
        name = self.world.device_name
        if self.world.is_main:
            about = self.run.record_environment(name)
            self.metrics.run_info.info({"recipe": self.settings.recipe, "precision": self.precision, **about})
        train, val = (self.dataset.manifest.split(split).samples for split in ("train", "val"))
        self.display.say(
            f"{self.run.folder}: recipe {self.settings.recipe}, {train:,} training and {val:,} validation "
            f"images in {len(self.dataset.manifest.classes):,} classes, "
            f"on {self.world.size} × {name} in {self.precision}"
        )
        if self.port is not None:
            self.display.say(f"metrics: http://{self.settings.address}:{self.port}/metrics")
        for note in self.notes:
            self.display.say(note)
