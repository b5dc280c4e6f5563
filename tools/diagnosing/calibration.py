"""Train the beginning of a run to measure it, and write what was found into a file, as JSON.

    python -m tools.diagnosing.calibration RESULT BEGUN SECONDS [SETTING …]

`alexnet-train doctor` runs this as a program of its own, because training may be killed for want of memory or
hang. RESULT: the file. BEGUN: time.monotonic() when the program was started. SECONDS: how long to measure.
The settings name a run folder that already holds the run. Everything is the trainer's own: its loader, its
step, its evaluation, its checkpoints and its verdict.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mode
from typing import Any

import torch

from pipeline import Batch, machine
from tools.diagnosing.findings import REFUSALS, problem
from tools.diagnosing.forecast import Calibration
from trainer.evaluate import evaluate
from trainer.forms import resolve_run_form
from trainer.initial import with_initial_net
from trainer.monitor.ceilings import measure_model
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.precision import resolve_run_precision
from trainer.processes import distributed
from trainer.processes.launch import end_process, launch, report_error, world_size
from trainer.processes.ranks import read_ranks
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import Settings
from trainer.train import Trainer
from trainer.tuning import measure

# Shares of the time to measure.
_LOADER, _NET, _TRAINING, _EVALUATION = 0.1, 0.2, 0.55, 0.15
_FIRST_STEPS = 2  # the first compiles and allocates, and the second tells how long a step takes
_INTERVALS = 5  # of training


def calibrate(settings: Settings, begun: float, seconds: float) -> Calibration:
    """Measure the beginning of the run in the settings' run folder.

    begun: time.monotonic() when the program was started. seconds: how long to measure, besides warm-up.
    """
    run, world = Run(settings.run_folder), distributed.join(settings.device)
    settings = resolve_run_precision(settings, run, world)
    settings, notes = resolve_run_form(settings, run, world)
    trainer = Trainer(settings, run, world, Metrics(), port=None, notes=notes)
    trainer.display.silent = True
    intervals, started = _train(trainer, _TRAINING * seconds)
    evaluation = _evaluate(trainer, _EVALUATION * seconds)
    saved = _save(trainer)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    decoding, dataset, notes = trainer.decoding, trainer.dataset, trainer.notes
    del trainer
    gc.collect()  # frees its net, before another is made
    images, classes = settings.batch // world.size, len(dataset.manifest.classes)

    def net(settings: Settings) -> float:
        share = _NET * seconds
        return measure_model(settings, classes, decoding, images, settings.precision, share)

    rates = [measure(decoding, settings, dataset, world, _LOADER * seconds), net(settings)]
    if settings.compile:
        rates.append(net(settings.model_copy(update={"compile": False})))
    loader, compiled, *plain = world.all_reduce(torch.tensor(rates, device=world.device)).tolist()
    by_interval = [interval.images_per_second for interval in intervals]
    step = sum(each.seconds for each in intervals) / sum(each.steps for each in intervals)
    return Calibration(
        processes=world.size,
        device=world.device_name,
        precision=settings.precision,
        notes=notes,
        start_seconds=max(0.0, started - begun - _FIRST_STEPS * step),
        loader=loader,
        net=compiled,
        plain_net=plain[0] if plain else None,
        training=settings.batch / step,
        slowest=min(by_interval),
        fastest=max(by_interval),
        step_seconds=step,
        verdict=mode(each.verdict for each in intervals),
        evaluation_seconds=evaluation,
        memory_bytes=memory,
        gpu_memory=_gpu_memory(world.device),
        **saved,
    )


def _train(trainer: Trainer, seconds: float) -> tuple[list[Interval], float]:
    """Train for about `seconds` after the first steps.

    Returns the log intervals, and time.monotonic() after the first steps.
    """
    batches, history = trainer.batches(), trainer.metrics.history

    def train(steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(batches)
        trainer.log()

    for _ in range(_FIRST_STEPS):
        train(1)
    trainer.intervals.report()
    started = time.monotonic()
    steps = max(1, round(seconds / _INTERVALS / history[-1].seconds))
    steps = trainer.world.broadcast(steps)  # all processes must take the same number
    history.clear()
    trainer.meter.restart()
    for _ in range(_INTERVALS):
        train(steps)
    trainer.intervals.report()
    return list(history), started


def _evaluate(trainer: Trainer, seconds: float) -> float:
    """Evaluate for at most about `seconds`, and return how many the whole validation set would take."""
    begun = time.monotonic()
    times: list[float] = []
    counts: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in trainer.validation_loader:
            yield batch
            times.append(time.monotonic() - begun)
            counts.append(len(batch[1]))
            if times[-1] > seconds:
                break

    learner = trainer.learner
    evaluate(learner.model, learner.precision, batches(), trainer.world, trainer.metrics)
    images = len(trainer.dataset.reader("val")) / trainer.world.size
    if len(times) < 2:
        return times[0] * images / counts[0]
    rate = sum(counts[1:]) / (times[-1] - times[0])
    return times[0] + (images - counts[0]) / rate  # the first batch waits for the decoder to start


def _save(trainer: Trainer) -> dict[str, Any]:
    """Save a checkpoint, and return the fields of Calibration about it. Raises RunError if that fails."""
    begun, used = time.monotonic(), time.process_time()
    trainer.saver.save(trainer.state())
    stall = time.monotonic() - begun
    trainer.saver.drain()
    delay = stall
    if trainer.world.device.type == "cpu":  # where writing takes its share of the cores that train
        delay = max(stall, (time.process_time() - used) / machine.cpus())
    newest = trainer.saver.wait_for_newest()
    return {
        "checkpoint_bytes": newest.stat().st_size if newest else 0,
        "checkpoint_delay": delay,
        "checkpoint_seconds": time.monotonic() - begun,
    }


def _gpu_memory(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def main() -> None:
    result, begun, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    try:
        settings = with_initial_net(load_settings(sys.argv[4:]))
        processes = world_size(settings)
        if processes > 1 and not read_ranks().is_launched:
            sys.exit(
                launch([sys.executable, "-m", f"{__package__}.calibration", *sys.argv[1:]], processes, 0)
            )
        calibration = calibrate(settings, begun, seconds)
    except (*REFUSALS, RuntimeError) as error:  # the latter from torch, its compiler or a library
        report_error(f"{problem('', error).text}", 1)
        end_process(1)
    distributed.leave()
    if not read_ranks().rank:
        result.write_text(json.dumps(asdict(calibration)))


if __name__ == "__main__":
    main()
