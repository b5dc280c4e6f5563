"""Train a net as in section 5 of the paper: the loop over steps, evaluations and checkpoints."""

import signal
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch

from pipeline import Batch, Damage, Dataset, DatasetError, EvaluationLoader, Loader
from trainer import checkpoint
from trainer.build import build_decoding, build_loader
from trainer.damage import DamagedSamples
from trainer.forms import resolve_run_form
from trainer.intervals import Intervals
from trainer.learner import Learner
from trainer.monitor.ceilings import calibrate, loader_work, model_work
from trainer.monitor.device_events import RunAheadLimit
from trainer.monitor.display import Display
from trainer.monitor.health import Health
from trainer.monitor.journal import Journal
from trainer.monitor.metrics import Metrics
from trainer.monitor.server import start_server
from trainer.optim import learning_rate, set_learning_rate, unscheduled_rate
from trainer.precision import resolve_run_precision
from trainer.processes import distributed
from trainer.processes.distributed import World
from trainer.processes.ranks import read_ranks
from trainer.processes.stop import Stopped, StopRequest, WaitEndedError
from trainer.processes.watchdog import Watchdog
from trainer.run import Run
from trainer.saver import Saver
from trainer.settings import Settings
from trainer.step import all_finite
from trainer.tuning import tune
from trainer.validation import Validation

# For how long a process waits for another one: the watchdog ends it earlier, unless --stall-seconds is 0.
PATIENCE = timedelta(days=30)
ALMOST_COMPLETE = 0.9999  # the progress during the last evaluation and the report


def train(settings: Settings, run: Run) -> None:
    """Begin the run that the settings describe, or continue it, train to its end and write its report.

    Raises SettingsError, DatasetError, RunError or OSError with a message for the user (PeerLostError, a
    RunError, if another process has ended), and Stopped after a signal once a checkpoint is saved.
    """
    metrics, server = Metrics(), None
    watchdog = Watchdog(metrics, settings.stall_seconds, read_ranks().rank)
    try:
        with distributed.raising_peer_lost():
            with metrics.activity("start-up"):
                world = distributed.join(settings.device, PATIENCE)
                settings = resolve_run_precision(settings, run, world)
                server = start_server(metrics, settings, world)
                settings, notes = resolve_run_form(settings, run, world)
                trainer = Trainer(settings, run, world, metrics, server.port if server else None, notes)
                if settings.calibrate:
                    trainer.calibrate()
            trainer.run_to_end()
            distributed.leave()
            if server is not None:
                with trainer.stop:
                    server.wait_for_scrape(trainer.stop)
    finally:
        if server is not None:
            server.close()
        watchdog.close()


class Trainer:
    """The state of a run between two steps, and the loop that advances it.

    port: port of the metrics server, if there is one. notes: lines for the log at the start.
    """

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
        self.stop = StopRequest()
        mean = world.broadcast(run.net(settings).mean if world.is_main else None)
        processes = read_ranks().local_world_size
        self.dataset = Dataset(settings.data, mean, processes, settings.cache_options)
        if self.dataset.storage is not None:
            self.dataset.storage.on_wait = self._wait_on
            metrics.follow_storage(self.dataset.storage.counters)
        for split in ("train", "val"):
            self.dataset.reader(split)  # finds a damaged dataset before training begins
        decoding = build_decoding(settings, world.device)
        self.decoding, tuning_notes = tune(decoding, settings, self.dataset, world)
        self.loader = self._loader()
        self.steps = self.loader.steps(settings.epochs)
        self.step = 0
        self.validation = Validation(settings, world, metrics, self.stop)
        self.stopping = False  # whether all processes have agreed to stop

        self.learner = Learner(settings, len(self.dataset.manifest.classes), world)
        self.run_ahead = RunAheadLimit(world.device)
        self.notes = [*notes, *tuning_notes, *self._resume()]
        self.display = Display(self.steps, self.step, silent=not world.is_main)
        self.damaged = DamagedSamples(settings.max_bad_samples, world, metrics, self.stop, self.display.warn)
        self.journal = Journal(run, world, metrics, self.display, self.dataset, settings.tensorboard)
        self.saver = Saver(run, settings, metrics, self.display.warn)
        health = Health(settings, len(self.dataset.manifest.classes), self.saver.wait_for_newest, metrics)
        health.restore(self.journal.rewind_to(self.step))
        self.intervals = Intervals(world, self.learner, self.journal, health)
        self.meter = self.intervals.meter

    def epoch_at(self, step: int) -> float:
        """Return the number of epochs done after `step` steps, as a fraction."""
        return step * self.loader.batch / self.loader.samples

    @property
    def epochs_done(self) -> int:
        """The number of complete epochs."""
        return self.step * self.loader.batch // self.loader.samples

    def calibrate(self) -> None:
        """Measure the throughput of the loader and of the model, with an additional net."""
        classes, share = len(self.dataset.manifest.classes), self.settings.batch // self.world.size
        model = model_work(self.settings, classes, self.decoding, share, self.learner.precision)
        works = {"loader": loader_work(self.batches()), "model": model}
        calibrate(works, self.metrics, self.world.device)

    def run_to_end(self) -> None:
        """Train to the last step, and write the report. Raises as `train` does."""
        with self.display, self.stop, self.saver, self.journal.trainjob:
            self.journal.log_start(
                self.settings, self.dataset.manifest, self.learner.precision, self.port, self.notes
            )
            try:
                self._train()
            except DatasetError as error:
                # Save the state after the last complete step; the next step has not begun.
                self.intervals.report()
                if self.step and not self.stopping and all_finite(self.learner.watched):
                    self._save()
                if isinstance(error, WaitEndedError):
                    self._raise_stopped(alone=True)
                raise
            self.saver.drain()
            if self.world.is_main:
                from trainer.monitor.report import write_report

                self.metrics.record_progress("report")
                self.display.say(f"done: {write_report(self.run, self.dataset)}")
                self.journal.trainjob.complete()
            self.metrics.progress_ratio.set(1)

    def _train(self) -> None:
        batches = self.batches()
        self.meter.restart()  # the first interval begins here, after start-up and calibration
        save_due = False
        while True:
            best = False
            is_last = self.step == self.steps
            if self.validation.is_due(self.epochs_done, is_last) and not self.stopping:
                best = self._evaluate(is_last)
                save_due = True
            if save_due or self.stopping:
                self._save(best)
            if self.stopping:
                self._raise_stopped()
            if not is_last and self.validation.ends_run:
                self.journal.log_early_end(self.epoch_at(self.step), self.settings)
            if is_last or self.validation.ends_run:
                break
            with self.metrics.activity("train"):
                epochs = self.epochs_done
                self.train_step(batches)
                epoch_ends, every = self.epochs_done > epochs, self.settings.checkpoint_steps
                save_due = epoch_ends or (every > 0 and self.step % every == 0)
                log_due = epoch_ends or self.step % self.settings.log_every == 0
                # Several processes must stop at the same step, so they agree on it when a step is logged.
                if log_due or save_due or (self.stop.is_made and self.world.size == 1):
                    self.stopping, timed_save_due = self.log(save_due)
                    save_due |= timed_save_due
                    if self.world.is_main:  # only the main process saves
                        self.saver.report_failures()
                if save_due or self.stopping:
                    self.intervals.report()  # checks the state that will be saved, and writes its rows

    def batches(self) -> Iterator[Batch]:
        """Return this process's share of the batch of each step, from the current step on."""
        return iter(self.loader.batches(self.step))

    def _loader(self) -> Loader:
        world = self.world
        return build_loader(
            self.settings,
            self.dataset,
            self.decoding,
            rank=world.rank,
            world=world.size,
            on_damage=self._leave_out,
        )

    def _leave_out(self, damage: Damage) -> None:
        self.damaged.add(damage)

    @cached_property
    def validation_loader(self) -> EvaluationLoader:
        """This process's share of the validation set; each iteration over it is one pass."""
        return EvaluationLoader(
            self.dataset,
            self.settings.evaluation_batch,
            rank=self.world.rank,
            world=self.world.size,
            on_damage=self._leave_out,
            **vars(self.decoding),
        )

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Do one step: wait for the batch, set the learning rate, and update the weights."""
        begun = time.monotonic()
        self.run_ahead.wait()
        self.metrics.record_progress("input")
        requested = time.monotonic()
        pixels, labels = next(batches)
        wait = time.monotonic() - requested
        self.metrics.record_progress("step")
        self.metrics.live.batch.offer(pixels, labels, self.step, self.epoch_at(self.step))
        epoch = self.epoch_at(self.step + 1)
        self.learning_rate = learning_rate(self.settings, epoch, self.validation.errors)
        unscheduled = unscheduled_rate(self.settings, epoch)
        set_learning_rate(self.learner.optimizer, self.learning_rate, epoch, unscheduled)
        # Dropout depends only on the seed, the step and the rank, so checkpoints need no random state.
        sequence = np.random.SeedSequence((self.settings.seed, self.step, self.world.rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

        self.meter.begin_step()
        loss, wrong = self.learner.step(pixels, labels)
        self.meter.end_step(loss, wrong, len(labels))
        self.step += 1

        self.meter.add_wait(wait)
        self.metrics.input_wait_seconds["train"].observe(wait)
        self.metrics.step_seconds["train"].observe(time.monotonic() - begun)
        self.metrics.images["train"].inc(len(labels))
        self._show_progress()

    def _show_progress(self) -> None:
        self.metrics.step.set(self.step)
        self.metrics.epoch.set(self.epoch_at(self.step))
        self.metrics.progress_ratio.set(min(self.step / self.steps, ALMOST_COMPLETE))

    def log(self, saves: bool = False) -> tuple[bool, bool]:
        """End a log interval, and report it. Raises RunError if the run cannot go on.

        saves: whether the state is saved after this step in any case. Returns whether the processes stop, and
        whether they save because of --checkpoint-seconds.
        """
        self.metrics.record_progress("log")
        save = self.world.is_main and self.saver.is_due and not saves
        epoch = self.epoch_at(self.step)
        return self.intervals.end(self.step, epoch, self.learning_rate, self.stop.is_made, save)

    def _evaluate(self, is_last: bool) -> bool:
        """Evaluate the centre crops of the validation set, and report the result.

        is_last: whether training is complete. If a process is asked to stop meanwhile, there is no result.
        Returns whether the top-1 error is the lowest so far.
        """
        with self.metrics.activity("eval"):
            self.learner.share_buffers()
            result = self.validation.run(self.learner, self.validation_loader, self.epochs_done, is_last)
        self.stopping = result is None
        if result is None:
            return False
        self.journal.record_evaluation(self.step, self.epoch_at(self.step), result)
        self.meter.restart()
        return result.is_best

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "step": self.step,
            "errors": self.validation.errors,
            "evaluated": self.validation.epochs,
            "time": time.time(),
            **self.learner.state(),
        }

    def _save(self, best: bool = False) -> None:
        with self.metrics.activity("checkpoint"):
            if self.world.is_main:
                self.saver.save(self.state(), best)
        self.meter.restart()

    def _raise_stopped(self, alone: bool = False) -> NoReturn:
        """Wait until the checkpoint is saved, and raise Stopped.

        alone: whether the other processes may not know yet that the run stops. Raises RunError instead if the
        checkpoint cannot be saved, and DatasetError if damaged samples made the run stop.
        """
        self.saver.drain()
        damage = self.stop.error is not None
        if not alone:
            # The processes wait for each other, because torchrun ends the others as soon as one of them ends.
            damage = self.world.any(damage)
        number = self.stop.signal or signal.SIGTERM
        why = "damaged samples" if damage else number.name
        done = f"saved after step {self.step}" if self.step else "stopped before the first step"
        self.display.say(f"{why}: {done}; run the same command again to continue")
        raise self.stop.error or Stopped(number)

    def _wait_on(self) -> None:
        """Called again and again while a batch waits for storage. Raises WaitEndedError if it should not."""
        self.metrics.record_progress()
        if self.stop.is_made:
            raise WaitEndedError("the run was asked to stop")

    def _resume(self) -> list[str]:
        """Load the newest intact checkpoint, or else any initial weights. Returns notes for the log."""
        state, notes = checkpoint.load(self.run.checkpoints, self.world.device)
        if state is not None:
            self.learner.load_state(state)
            self.step = state["step"]
            self._show_progress()
            self.validation.errors, self.validation.epochs = state["errors"], state["evaluated"]
            if self.world.is_main:
                self.metrics.checkpoint_timestamp.set(state["time"])
            notes.append(
                f"continuing {self.run.folder} after step {self.step}, epoch {self.epoch_at(self.step):.2f}"
            )
        elif folder := self.settings.initial_weights:
            classes, layers = self.dataset.manifest.classes, self.settings.initial_layers
            notes.append(self.learner.load_initial_weights(folder, classes, layers))
        self.world.check_same_checkpoint(
            "; ".join(notes) or "starting without one",
            "All hosts must see the same intact --out and --initial-weights",
        )
        return notes
