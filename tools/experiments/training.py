"""The training runs of an experiment, each `alexnet-train` in its own process and run folder."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.machine import cpus
from pipeline.manifest import read_manifest
from tools.experiments.record import TOP1, TOP5, Measures
from tools.options import command_line
from trainer.run import Run
from trainer.settings import load_settings


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
        command = [sys.executable, "-m", "trainer.cli", "--out", str(folder), "--port", "0", *settings]
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
            f"{done}/{len(left)} {training.folder.name}: top-1 error {evaluation['top1_error']:.1%}, "
            f"after {minutes:.0f} min, about {minutes / done * (len(left) - done):.0f} min left",
            flush=True,
        )
        return evaluation

    with ThreadPoolExecutor(jobs) as pool:
        trained = pool.map(train_step, left)
        return [evaluation or next(trained) for evaluation in found]


def measured(evaluations: Iterable[dict[str, float]]) -> Measures:
    """Return the errors of evaluations, in percent."""
    columns = {TOP1: "top1_error", TOP5: "top5_error"}
    rows = list(evaluations)
    return {measure: [100 * row[column] for row in rows] for measure, column in columns.items()}


def about(trainings: Sequence[Training]) -> dict[str, Any]:
    """Return a record's fields on data, budget and machine, once the runs are trained."""
    run = Run(trainings[0].folder)
    settings = run.settings()
    seeds = len({Run(training.folder).settings().seed for training in trainings})
    return {
        "data": f"{describe(settings.data)}; recipe {settings.recipe}, {settings.epochs} epochs at a crop of "
        f"{settings.crop} px and a batch of {settings.batch}, {seeds} seed{'s' if seeds > 1 else ''}",
        "command": command_line(),
        "environment": run.starts()[-1],
    }


def describe(data: Path) -> str:
    """Describe a dataset in words."""
    manifest = read_manifest(data)
    train, val = (manifest.split(split).samples for split in ("train", "val"))
    return (
        f"{data.resolve().name}: {train:,} training and {val:,} validation images of "
        f"{len(manifest.classes):,} classes, {manifest.size} px, fingerprint {manifest.fingerprint[:12]}"
    )
