"""The training loop, from top to bottom: section 5 of the paper, with the loader, the net and the metrics."""

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import takewhile
from typing import Any, NoReturn

import numpy as np
import torch

from pipeline.checked import Damage
from pipeline.loader import Batch, Dataset, evaluation_loader, train_loader
from pipeline.manifest import DatasetError
from pipeline.plan import Plan
from trainer import checkpoint
from trainer.build import build_decoding, processes_here
from trainer.evaluate import evaluate
from trainer.forms import settle_form
from trainer.intervals import Intervals
from trainer.learner import Learner
from trainer.monitor.ceilings import calibrate, loader_work, model_work
from trainer.monitor.display import Display
from trainer.monitor.health import Health
from trainer.monitor.journal import Journal
from trainer.monitor.metrics import Metrics
from trainer.monitor.moment import Lead
from trainer.monitor.server import serve
from trainer.optim import learning_rate, set_learning_rate
from trainer.precision import settle_precision
from trainer.processes import distributed
from trainer.processes.distributed import World
from trainer.processes.place import place
from trainer.processes.stop import Stopped, StopRequest
from trainer.processes.watchdog import Watchdog
from trainer.run import Run
from trainer.saver import Saver
from trainer.settings import Settings
from trainer.step import all_finite
from trainer.tuning import tuned


def train(settings: Settings, run: Run) -> None:
    """Train as the settings say, or continue the run in the folder, and write its report.

    Raises SettingsError, DatasetError, RunError or OSError with a message for the user (LostError, a
    RunError, if another process is gone), and Stopped after SIGTERM or SIGINT once a checkpoint is saved.
    """
    metrics, server = Metrics(), None
    watchdog = Watchdog(metrics, settings.stall_seconds, place().rank)
    try:
        with distributed.noticing_loss():
            with metrics.activity("start-up"):
                world = distributed.join(settings.device)
                settings = settle_precision(settings, run, world)
                server = serve(metrics, settings, world)
                settings, notes = settle_form(settings, run, world)
                trainer = Trainer(settings, run, world, metrics, server.port if server else None, notes)
                if settings.calibrate:
                    trainer.calibrate()
            trainer.run_to_end()
    finally:
        if server is not None:
            server.close()
        distributed.leave()
        watchdog.close()


class Trainer:
    """The state of a run between two steps, and the loop that advances it."""

    def __init__(
        self,
        settings: Settings,
        run: Run,
        world: World,
        metrics: Metrics,
        port: int | None,
        notes: Iterable[str] = (),
    ):
        self.settings, self.run, self.world = settings, run, world
        self.metrics, self.port = metrics, port
        self.dataset = Dataset(settings.data, processes=processes_here())
        self.plan = Plan(
            seed=settings.seed,
            batch=settings.batch,
            shard_samples=tuple(shard.samples for shard in self.dataset.manifest.split("train").shards),
            window=settings.shuffle_window,
        )
        for split in ("train", "val"):
            self.dataset.reader(split)  # finds damage now, not in an hour
        decoding = build_decoding(settings, world.device)
        self.decoding, tuning_notes = tuned(decoding, settings, self.dataset, self.plan, world)
        self.steps = self.plan.steps(settings.epochs)
        self.step = 0
        self.errors: list[float] = []  # top-1 on the validation set, one per evaluation
        self.evaluated = 0  # epochs done at the last evaluation
        self.bad: set[str] = set()  # locations of samples that were left out
        self.stop = StopRequest()
        self.stopping = False  # agreed by all processes

        self.learner = Learner(settings, len(self.dataset.manifest.classes), world)
        self.lead = Lead(world.device)
        self.notes = [*notes, *tuning_notes, *self._resume()]
        self.display = Display(self.steps, self.step, silent=not world.is_main)
        self.journal = Journal(run, world, metrics, self.display)
        self.saver = Saver(run, settings, metrics, self.display.warn)
        health = Health(settings, len(self.dataset.manifest.classes), self.saver.newest, metrics)
        health.remember(self.journal.go_back_to(self.step))
        self.intervals = Intervals(world, self.learner, self.journal, health)
        self.meter = self.intervals.meter

    def epoch_at(self, step: int) -> float:
        """Return the number of epochs done after `step` steps, as a fraction."""
        return step * self.plan.batch / self.plan.samples

    @property
    def epochs_done(self) -> int:
        return self.step * self.plan.batch // self.plan.samples

    def calibrate(self) -> None:
        """Measure the ceilings of the loader and the model, on a separate loader and a separate net."""
        classes, share = len(self.dataset.manifest.classes), self.settings.batch // self.world.size
        model = model_work(self.settings, classes, self.decoding, share, self.learner.precision)
        works = {"loader": loader_work(self.batches()), "model": model}
        calibrate(works, self.metrics, self.world.device)

    def run_to_end(self) -> None:
        with self.display, self.stop, self.saver:
            self.journal.introduce(
                self.settings, self.dataset.manifest, self.learner.precision, self.port, self.notes
            )
            try:
                self._train()
            except DatasetError:
                # The last step is complete, and the next one has not begun.
                self.intervals.report()
                if self.step and not self.stopping and all_finite(self.learner.model.parameters()):
                    self._save()
                raise
            self.saver.drain()
            if self.world.is_main:
                from trainer.monitor.report import write_report

                self.metrics.progress("report")
                self.display.say(f"done: {write_report(self.run, self.dataset.manifest)}")

    def _train(self) -> None:
        batches = self.batches()
        save_due = False
        while True:
            best = False
            if self._evaluation_is_due() and not self.stopping:
                best = self._evaluate()
                save_due = True
            if save_due or self.stopping:
                self._save(best)
            if self.stopping:
                self._leave()
            if self.step == self.steps:
                break
            with self.metrics.activity("train"):
                epochs = self.epochs_done
                self.train_one(batches)
                epoch_ends, every = self.epochs_done > epochs, self.settings.checkpoint_steps
                save_due = epoch_ends or (every > 0 and self.step % every == 0)
                log_due = epoch_ends or self.step % self.settings.log_every == 0
                # Several processes must stop at the same step, on which they agree when they log.
                if log_due or save_due or (self.stop.is_made and self.world.size == 1):
                    self.log()
                    self.stopping = self.world.any(self.stop.is_made)
                    if self.world.is_main:  # only the main process saves
                        self.saver.report()
                        save_due |= self.saver.is_due
                if save_due or self.stopping:
                    self.intervals.report()  # checks what is about to be saved, and writes its rows

    def _evaluation_is_due(self) -> bool:
        every = 1 if self.step == self.steps else self.settings.evaluate_epochs
        return self.epochs_done // every > self.evaluated // every

    def batches(self) -> Iterator[Batch]:
        """Return this process's share of each step from the current one on."""
        return train_loader(
            self.dataset,
            self.plan,
            range(self.step, sys.maxsize),
            self.decoding,
            crops_and_flips=self.settings.crops_and_flips,
            colour=self.settings.colour,
            colour_epochs=self.settings.colour_epochs,
            rank=self.world.rank,
            world=self.world.size,
            leave_out=self._leave_out,
        )

    @cached_property
    def validation(self) -> Iterable[Batch]:
        """This process's share of the validation set, once per iteration."""
        return evaluation_loader(
            self.dataset,
            "val",
            self.settings.evaluation_batch,
            self.decoding,
            rank=self.world.rank,
            world=self.world.size,
            leave_out=self._leave_out,
            kept=True,
        )

    def _leave_out(self, damage: Damage) -> None:
        """Count a damaged sample that is left out. Too many end the run with a DatasetError.

        With a single process, it is raised at once. With several, this one continues with the intact samples
        until all stop together and the main process saves.
        """
        self.metrics.input_errors[damage.reason].inc()
        if damage.location not in self.bad:
            self.display.warn(f"left out: {damage}")
            self.bad.add(damage.location)
        if len(self.bad) > self.settings.max_bad_samples:
            error = DatasetError(
                f"more than {self.settings.max_bad_samples} samples are damaged, the last of them {damage}: "
                "copy the shard again, or allow more with --max-bad-samples"
            )
            if self.world.size == 1:
                raise error
            self.stop.error = error

    def train_one(self, batches: Iterator[Batch]) -> None:
        """Do one step: wait for the batch, set the learning rate, update."""
        begun = time.monotonic()
        self.lead.hold()
        self.metrics.progress("input")
        asked = time.monotonic()
        pixels, labels = next(batches)
        waited = time.monotonic() - asked
        self.metrics.progress("step")
        epoch = self.epoch_at(self.step + 1)
        self.learning_rate = learning_rate(self.settings, epoch, self.errors)
        set_learning_rate(self.learner.optimizer, self.learning_rate, epoch)
        # Dropout depends only on the seed, the step and the rank, so a resume has no random state to restore.
        sequence = np.random.SeedSequence((self.settings.seed, self.step, self.world.rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

        self.meter.begin_step()
        loss, wrong = self.learner.step(pixels, labels)
        self.meter.end_step(loss, wrong, len(labels))
        self.step += 1

        self.meter.waited(waited)
        self.metrics.input_wait_seconds["train"].observe(waited)
        self.metrics.step_seconds["train"].observe(time.monotonic() - begun)
        self.metrics.images["train"].inc(len(labels))
        self.metrics.step.set(self.step)
        self.metrics.epoch.set(self.epoch_at(self.step))
        self.metrics.progress_ratio.set(self.step / self.steps)

    def log(self) -> None:
        """End a log interval. Raises RunError if the run cannot go on."""
        self.metrics.progress("log")
        self.intervals.end(self.step, self.epoch_at(self.step), self.learning_rate)

    def _evaluate(self) -> bool:
        """Evaluate the centre crop of the whole validation set, unless a process is asked to stop meanwhile.

        Returns whether the top-1 error is the lowest so far.
        """
        with self.metrics.activity("eval"):
            batches = takewhile(lambda _: not self.stop.is_made, self.validation)
            scores = evaluate(self.learner.model, self.learner.precision, batches, self.world, self.metrics)
        self.stopping = self.world.any(self.stop.is_made)
        if self.stopping:
            return False
        best = scores.top1_error < min(self.errors, default=math.inf)
        self.errors.append(scores.top1_error)
        self.evaluated = self.epochs_done
        self.journal.scores(self.step, self.epoch_at(self.step), scores)
        self.meter.restart()
        return best

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "step": self.step,
            "errors": self.errors,
            "evaluated": self.evaluated,
            "time": time.time(),
            **self.learner.state(),
        }

    def _save(self, best: bool = False) -> None:
        with self.metrics.activity("checkpoint"):
            if self.world.is_main:
                self.saver.save(self.state(), best)
        self.meter.restart()

    def _leave(self) -> NoReturn:
        """Stop as asked, once the checkpoint is saved: raises Stopped.

        Raises RunError instead if it cannot be saved, and DatasetError if damaged samples are the cause.
        """
        self.saver.drain()
        # All processes wait for each other here, because torchrun ends the others as soon as one is gone.
        damage = self.world.any(self.stop.error is not None)
        by = self.stop.signal or signal.SIGTERM
        why = "damaged samples" if damage else by.name
        self.display.say(f"{why}: saved after step {self.step}; run the same command again to continue")
        raise self.stop.error or Stopped(by)

    def _resume(self) -> list[str]:
        """Load the newest good checkpoint if there is one. Returns notes for the log."""
        state, notes = checkpoint.load(self.run.checkpoints, self.world.device)
        if state is not None:
            self.learner.load_state(state)
            self.step, self.errors, self.evaluated = state["step"], state["errors"], state["evaluated"]
            if self.world.is_main:
                self.metrics.checkpoint_timestamp.set(state["time"])
            notes.append(
                f"continuing {self.run.folder} after step {self.step}, epoch {self.epoch_at(self.step):.2f}"
            )
        elif self.settings.initial_weights:
            classes = self.dataset.manifest.classes
            notes.append(self.learner.begin_with(self.settings.initial_weights, classes))
        return notes
