"""The training runs of an experiment, each `alexnet-train` in its own process and run folder."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.locations import Location, name_of
from pipeline.machine import cpus
from pipeline.manifest import read_manifest
from pipeline.names import ROOT
from tools.experiments.record import TrainedRun
from tools.options import command_line
from trainer.monitor.summary import read_summary
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import Settings


class TrainingError(RuntimeError):
    """A training run that failed; the message is one line."""


class DivergedError(TrainingError):
    """A training run whose loss or weights are no longer finite."""


_DIVERGED = " finite. "  # part of the message with which trainer/monitor/health.py ends a diverged run


class Training(NamedTuple):
    """A training run. folder: its run folder. settings: command-line arguments of alexnet-train."""

    folder: Path
    settings: Sequence[str]


def outcome(training: Training) -> dict[str, float] | None:
    """Return a run's last validation, or None if it is not finished.

    Raises SettingsError if the folder holds another run.
    """
    run, chosen = Run(training.folder), load_settings(training.settings)
    if run.check_is_new(chosen, read_manifest(chosen.data)) or not run.is_finished:
        return None
    return run.evaluations.rows()[-1]


def train(training: Training, jobs: int = 1) -> dict[str, float]:
    """Start or resume a run; return its last validation. jobs: number of runs that share the CPUs.

    Raises DivergedError, also for a run that has diverged before, or TrainingError.
    """
    folder, settings = training
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    if _DIVERGED in _last_line(log):
        raise DivergedError(f"{folder.name} has diverged, see {log}; delete the log to train it again")
    environment = {"OMP_NUM_THREADS": str(max(1, cpus() // jobs)), **os.environ}
    with open(log, "a") as file:
        command = [sys.executable, "-m", f"{ROOT}trainer.cli", "--out", str(folder), "--port", "0", *settings]
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        last = _last_line(log)
        kind = DivergedError if _DIVERGED in last else TrainingError
        raise kind(f"{folder.name} ended with exit code {done.returncode}, see {log}: {last}")
    return Run(folder).evaluations.rows()[-1]


def _last_line(log: Path) -> str:
    return "".join(log.read_text().strip().splitlines()[-1:]) if log.exists() else ""


def train_all(
    trainings: Sequence[Training], jobs: int = 1, may_diverge: bool = False
) -> list[dict[str, float]]:
    """Train the runs that are not finished, `jobs` at a time; return the last validation of every run.

    may_diverge: return infinite errors for a run that diverges. Raises TrainingError for the first run that
    fails, or SettingsError if a folder holds another run.
    """
    found = [outcome(training) for training in trainings]
    left = [training for training, evaluation in zip(trainings, found, strict=True) if evaluation is None]
    begun, done = time.monotonic(), 0

    def train_step(training: Training) -> dict[str, float]:
        nonlocal done
        try:
            evaluation = train(training, jobs)
        except DivergedError:
            if not may_diverge:
                raise
            evaluation = {"top1_error": math.inf, "top5_error": math.inf}
        done += 1
        minutes = (time.monotonic() - begun) / 60
        print(
            f"{done}/{len(left)} {training.folder.name}: {_text(evaluation['top1_error'])}, "
            f"after {minutes:.0f} min, about {minutes / done * (len(left) - done):.0f} min left",
            flush=True,
        )
        return evaluation

    with ThreadPoolExecutor(jobs) as pool:
        trained = pool.map(train_step, left)
        return [evaluation or next(trained) for evaluation in found]


def _text(error: float) -> str:
    return f"top-1 error {error:.1%}" if error < math.inf else "diverged"


def about(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return a record's fields on data, budget, machine and runs, once the runs are trained."""
    runs = [Run(training.folder) for training in trainings]
    settings = runs[0].settings()
    seeds = len({run.settings().seed for run in runs})
    return {
        "data": f"{describe(settings.data)}; recipe {settings.recipe}, {settings.epochs} epochs at a crop of "
        f"{settings.crop} px and a batch of {settings.batch}, {seeds} seed{'s' if seeds > 1 else ''}",
        "command": command_line(),
        "environment": runs[0].starts()[-1],
        "dataset": packing(settings.data),
        **provenance(runs),
    }


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a record's fields `settings` and `runs`: what reproduces the runs, and how long they took."""
    chosen = [_chosen(run) for run in runs]
    common = {
        name: value
        for name, value in chosen[0].items()
        if all(name in other and other[name] == value for other in chosen)
    }
    return {
        "settings": common,
        "runs": [
            TrainedRun(
                name=run.folder.resolve().name,
                seed=run.settings().seed,
                settings={name: value for name, value in own.items() if name not in common},
                minutes=round(read_summary(run.folder).training_seconds / 60, 4),
            )
            for run, own in zip(runs, chosen, strict=True)
        ],
    }


def _chosen(run: Run) -> dict[str, Any]:
    """Return a run's recipe, epochs, dropout, learning rate, used precision, and what is not a default.

    The seed is left out, and of the run with the initial weights there is only the name.
    """
    settings = run.settings()
    defaults = Settings.model_construct().identity()
    used = settings.identity() | run.recorded_settings().get("resolved", {})
    always = {name: used[name] for name in ("epochs", "dropout", "learning_rate", "precision")}
    others = {name: value for name, value in used.items() if value != defaults.get(name)}
    found = {"recipe": Path(settings.recipe).name} | always | others
    if settings.initial_weights:
        found["initial_weights"] = settings.initial_weights.name
    return {name: value for name, value in found.items() if name not in ("seed", "device")}


def packing(data: Location) -> dict[str, Any]:
    """Return a record's field `dataset`: its fingerprint, and how it was packed."""
    manifest = read_manifest(data)
    return {
        "name": name_of(data),
        "fingerprint": manifest.fingerprint,
        "geometry": manifest.geometry,
        "size": manifest.size,
        **manifest.packed,
    }


def describe(data: Location) -> str:
    """Describe a dataset in words."""
    manifest = read_manifest(data)
    train, val = (manifest.split(split).samples for split in ("train", "val"))
    size = f"{manifest.size} px"
    if manifest.geometry == "original":
        size = f"originals of at most {manifest.max_width}×{manifest.max_height} px"
    return (
        f"{name_of(data)}: {train:,} training and {val:,} validation images of "
        f"{len(manifest.classes):,} classes, {size}, fingerprint {manifest.fingerprint[:12]}"
    )
