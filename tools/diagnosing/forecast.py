"""What a run will take, what will limit it, and which settings that speaks for: arithmetic on measurements.

Each advice follows from a figure that was measured on this machine, or from arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.duration import duration
from tools.diagnosing.findings import Finding, size
from tools.diagnosing.preparation import IMAGENET, Data
from trainer.settings import Settings

LIMITS = {  # by the trainer's verdict
    "compute-bound": "the net: the device computes without a pause",
    "input-bound": "the loader: the device waits for images",
    "storage-bound": "the storage behind the URL, as long as shards still arrive",
    "host gap": "the host: images are ready, but the device waits for the host to start its work",
    "mixed": "no single stage: the device sometimes waits for images, and sometimes for the host",
}
_LOST_SECONDS = 1800.0  # of work that a kill may cost before it is worth saving more often
_SAVED_SECONDS = 600  # between checkpoints, where an epoch is longer than that
_LINE_SECONDS = 120.0  # between two lines of the log, from which they are worth having more often
_EVALUATING = 0.1  # share of a run's time that evaluations take, from which they are worth having less often
_WORTH_SECONDS = 60.0  # that a setting must save to be advised
_FASTER = 1.05  # how much faster another way must be to be advised


@dataclass(frozen=True)
class Calibration:
    """What was measured over the first steps of a run.

    Images/s are those of all processes together. loader, net: the loader and the training step, each on its
    own. plain_net: the same step without --compile, if the settings have it. training: real steps, of which
    the slowest and the fastest fifth are given, too. step_seconds: of one of them. verdict: that of the
    trainer. start_seconds: from the command to the first step. evaluation_seconds: for the whole validation
    set. checkpoint_delay: seconds by which saving delays training. checkpoint_seconds: until it is on the
    disk. memory_bytes: the largest resident memory of a process. gpu_memory: share of the GPU's memory in
    use, if there is one.
    """

    processes: int
    device: str
    precision: str
    notes: list[str]
    start_seconds: float
    loader: float
    net: float
    plain_net: float | None
    training: float
    slowest: float
    fastest: float
    step_seconds: float
    verdict: str
    evaluation_seconds: float
    checkpoint_bytes: int
    checkpoint_delay: float
    checkpoint_seconds: float
    memory_bytes: int
    gpu_memory: float | None


@dataclass(frozen=True)
class Forecast:
    """The seconds of an epoch with its evaluation and its checkpoint, of that evaluation, and of the run."""

    epoch_seconds: float
    evaluation_seconds: float
    run_seconds: float


def forecast(settings: Settings, measured: Calibration, data: Data, measured_val: int) -> Forecast:
    """Return how long a run will take, apart from its report.

    measured_val: number of validation images of the dataset that was measured.
    """
    evaluation = measured.evaluation_seconds * data.val / measured_val
    steps = data.train / measured.training
    evaluations = math.ceil(settings.epochs / settings.evaluate_epochs)
    run = measured.start_seconds + evaluations * evaluation
    run += settings.epochs * (steps + measured.checkpoint_delay)
    run += measured.checkpoint_seconds - measured.checkpoint_delay  # the last checkpoint is waited for
    return Forecast(steps + evaluation + measured.checkpoint_delay, evaluation, run)


def rates(settings: Settings, measured: Calibration) -> Iterator[Finding]:
    """Describe what was measured."""
    yield Finding("loader alone", f"{number(measured.loader)} images/s")
    how = f"{measured.precision}, batch {settings.batch}, crop {settings.crop}"
    yield Finding("net alone", f"{number(measured.net)} images/s in {how}")
    if measured.plain_net is not None:
        yield Finding("not compiled", f"{number(measured.plain_net)} images/s of the net alone")
    spread = f"{number(measured.slowest)} to {number(measured.fastest)}"
    many = f" in {measured.processes} processes" if measured.processes > 1 else ""
    together = f"loader and net together{many}"
    yield Finding("training", f"{number(measured.training)} images/s ({spread}), {together}")
    yield Finding("limit", _limit(measured))
    gpu = "" if measured.gpu_memory is None else f"; {measured.gpu_memory:.0%} of the GPU's memory"
    yield Finding("takes", f"{size(measured.memory_bytes)} of memory in each process at most{gpu}")
    yield from (Finding("note", text) for text in measured.notes)


def _limit(measured: Calibration) -> str:
    """Say what limits training.

    On a CPU, loader and net share the cores, and neither waits for the other; several processes also wait for
    each other's gradients.
    """
    loader, net = measured.training / measured.loader, measured.training / measured.net
    limit = LIMITS[measured.verdict]
    if measured.device == "CPU" and measured.verdict != "storage-bound":
        first, second = ("loader", "net") if loader > net else ("net", "loader")
        limit = f"the {first}, which shares the cores with the {second}"
        if measured.processes > 1 and 1 - loader - net > max(loader, net):
            limit = "the exchange of gradients, for which the processes wait"
    alone = f"the loader alone would take {loader:.0%}, and the net alone {net:.0%}"
    return f"{limit}; of the time of a step, {alone}"


def times(settings: Settings, measured: Calibration, expected: Forecast, data: Data) -> Iterator[Finding]:
    """Describe how long a run will take."""
    imagenet = " of ImageNet" if data is IMAGENET else ""
    evaluation, checkpoint = _seconds(expected.evaluation_seconds), _seconds(measured.checkpoint_delay)
    yield Finding(
        "an epoch",
        f"{duration(expected.epoch_seconds)} for {data.train:,} images{imagenet}, with {evaluation} for the "
        f"evaluation and {checkpoint} for the checkpoint",
    )
    most = " at most" if settings.stop_after else ""
    yield Finding(
        "the run",
        f"{duration(expected.run_seconds)}{most} for {settings.epochs:,} epochs of recipe {settings.recipe}, "
        f"with {_seconds(measured.start_seconds)} until the first step",
    )


def advice(settings: Settings, measured: Calibration, expected: Forecast) -> Iterator[Finding]:
    """Say which settings the figures speak for, each with its reason."""
    plain = measured.plain_net
    if plain is not None and plain > _FASTER * measured.net:
        yield Finding("--no-compile", f"the net alone is {plain / measured.net:.2f} times as fast without")
    evaluation, training = expected.evaluation_seconds, expected.epoch_seconds - expected.evaluation_seconds
    share = evaluation / expected.epoch_seconds
    every = min(settings.epochs, math.ceil(evaluation * (1 - _EVALUATING) / (_EVALUATING * training)))
    evaluations = math.ceil(settings.epochs / settings.evaluate_epochs)
    saved = evaluation * (evaluations - math.ceil(settings.epochs / every))
    if settings.schedule != "plateau" and every > settings.evaluate_epochs and saved > _WORTH_SECONDS:
        yield Finding(
            f"--evaluate-epochs {every}",
            f"an evaluation after each epoch takes {share:.0%} of the time; "
            f"this saves {duration(saved)} of the run",
        )
    saves_in_between = settings.checkpoint_seconds or settings.checkpoint_steps
    if not saves_in_between and expected.epoch_seconds > _LOST_SECONDS:
        cost = measured.checkpoint_delay / _SAVED_SECONDS
        yield Finding(
            f"--checkpoint-seconds {_SAVED_SECONDS}",
            f"a run that is killed would repeat up to {duration(expected.epoch_seconds)}; "
            f"saving this often takes {cost:.1%} of the time",
        )
    line = settings.log_every * measured.step_seconds
    if line > _LINE_SECONDS and settings.log_every > 1:
        every = max(1, round(_LINE_SECONDS / 2 / measured.step_seconds))
        yield Finding(
            f"--log-every {every}",
            f"a step takes {_seconds(measured.step_seconds)}, so the log and the live page would change only "
            f"every {duration(line)}",
        )


def disk(measured: Calibration, data: Data) -> Iterator[Finding]:
    """Compare what training reads with what the disk delivers."""
    if data.cold is None:
        return
    needed = measured.training * data.image_bytes
    text = f"training reads {size(needed)}/s, and the dataset's disk delivers {size(data.cold)}/s"
    if needed <= data.cold:
        yield Finding("disk", text)
        return
    when = "in the first epoch" if data.stays_in_memory else "in each epoch"
    yield Finding("disk", f"{text}, so it is the limit {when}", "note", "copy the shards to a faster disk")


def memory(measured: Calibration, free: int) -> Iterator[Finding]:
    """Compare the memory that the processes take with that which is free, in bytes."""
    needed = measured.processes * measured.memory_bytes
    if needed > free:
        text = f"training takes {size(needed)}, and {size(free)} were free"
        yield Finding("memory", text, "note", "end other programs, or use a smaller --batch")


def number(images: float) -> str:
    """Format images/s with three digits, or as a whole number."""
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"
