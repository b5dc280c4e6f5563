"""Measure the throughput of each stage on this machine: a table, then JSON on the last line.

    alexnet-train bench read loader --data shards
    alexnet-train bench all --data shards --input ILSVRC2012 --gates
    alexnet-train bench loader --data shards --sweep threads 1 2 4

    read    reading JPEG bytes from the shards in the plan's order; compared with DALI's own reader
    loader  reading, decoding, cropping, mirroring, normalising; compared with DALI's reader in the same graph
    peers   the loader, compared with other loaders, installed in the environment of --loader-peers
    model   forward, backward and update on a ready batch; compared with the same net from torch's own layers
    forms   the model with the form of convolutions chosen on this machine; compared with the other forms
    train   the training loop; compared with the loader alone and the model alone
    start   seconds from starting the command to the end of the first training step
    memory  GB of GPU memory that training has taken by the end of its first step
    save    seconds that a checkpoint delays training, and seconds until it is on the disk ($TMPDIR)
    pack    packing the files of --input into shards, in one process and in all; compared with --pack-peers

On a CPU, loader and peers are measured at batch sizes 32 and 128 unless --batch is given. The candidates of a
stage run in turn, after a warm-up run of each. A figure is the median of its runs, with the minimum and the
maximum; a ratio is the median of the ratios of runs from the same round. If a candidate fails, the table says
so, the others continue, and the exit code is 1. Any other option is a setting of `alexnet-train train`
(--batch, --recipe, --threads, …).

A gate is the goal of a stage: a ratio or, on a GPU, an amount that an H200 should reach. A gate is passed if
the median reaches the goal, undecided if only the 95 % interval of the median does (more --runs may decide
it), and missed otherwise. The interval comes from a bootstrap over the runs with fixed random draws; for five
runs or fewer it is their range. With --gates the exit code is 1 if a gate is missed, but not if it is
undecided.

A stage takes (runs + 1) × seconds for each line of its table, plus the time to compile or start what it
measures. With the defaults that is 90 s for read, 120 s for loader, 540 s for peers (half of that at a single
batch size), 120 s for model (150 s on a GPU), 180 s for forms and 90 s for train; the other stages last as
long as the work they do. Each stage prints how long it took.
"""

import argparse
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError
from pipeline.mixture import read_data
from pipeline.output import printed, secure
from pipeline.packing.workers import exit_on_signals
from tools.benchmarks.gates import Figures, judge
from tools.options import command_parser, count, positive, program
from trainer.environment import environment
from trainer.initial import with_initial_net
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

if TYPE_CHECKING:
    from tools.benchmarks.stages import Stage, Stages

STAGES = ("read", "loader", "peers", "model", "forms", "train", "start", "memory", "save", "pack")
UNITS = {"start": "s", "memory": "GB", "save": "s"}  # all other stages: images/s
RECORDED = {"images/s": "images_per_second", "s": "seconds", "GB": "gigabytes"}
NEEDS = {
    "peers": "--loader-peers .loader-peers/bin/python, which `make .loader-peers` installs",
    "pack": "--input: a folder of images to pack",
    "memory": "a GPU, and torch finds none on this machine",
}
BATCHES = dict.fromkeys(("loader", "peers"), (32, 128))  # on a CPU, unless --batch is given

FAILURES = (RuntimeError, ValueError, OSError)  # what a candidate raises if memory, CUDA or the disk fails


def in_turn(stage: "Stage", runs: int, limit: float = math.inf) -> tuple[Figures, dict[str, str]]:
    """Run each candidate once to warm up, then all in turn, so that a slow moment affects all of them.

    Returns the figures, and the errors of candidates that failed. Failed candidates have no figures and are
    removed from the stage, which frees their memory. limit: seconds within which all rounds but the first
    must end.
    """
    figures: Figures = {name: [] for name in stage}
    errors: dict[str, str] = {}
    begun = time.monotonic()
    for number in range(runs + 1):
        round_begun = time.monotonic()
        for name, run in list(stage.items()):
            try:
                figures[name].append(run())
            except FAILURES as error:
                errors[name] = one_line(error)
                figures[name] = []
                del stage[name]
        now = time.monotonic()
        if number and now + (now - round_begun) > begun + limit:
            break
    return {name: values[1:] for name, values in figures.items()}, errors


def one_line(error: Exception) -> str:
    """Return an error as one line; of a long error, only the end."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def table(label: str, figures: Figures, errors: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each candidate, with its ratio to the first."""
    unit, first = UNITS.get(label, "images/s"), next(iter(figures.values()), [])
    digits = ",.3f" if unit == "s" else ",.1f"
    for name, error in errors.items():
        yield f"{label:17} {name:20}failed: {error}"
    for name, values in figures.items():
        if not values:
            continue
        spread = f"{min(values):{digits}} to {max(values):{digits}}"
        line = f"{label:17} {name:20}{median(values):>12{digits}} {unit:8}  {spread:24}"
        if first and values is not first:
            ratio = median(a / b for a, b in zip(first, values, strict=True))
            line += f"{next(iter(figures))} is {ratio:.2f} × this"
        yield line


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "stages",
        nargs="+",
        choices=(*STAGES, "all"),
        metavar="STAGE",
        help="one or more of the stages above, or all",
    )
    add("--runs", type=count, default=5, metavar="N", help="measured runs of each candidate (default 5)")
    add("--seconds", type=positive, default=5.0, metavar="S", help="minimum length of a run (default 5)")
    add(
        "--limit",
        type=positive,
        default=math.inf,
        metavar="S",
        help="stop a stage's rounds after this many seconds, but finish the first one (default: no limit)",
    )
    add("--input", type=Path, metavar="DIR", help="folder of images for the stage pack")
    add(
        "--pack-peers",
        type=Path,
        metavar="PYTHON",
        help="Python of the environment that `make .pack-peers` installs, .pack-peers/bin/python; the stage "
        "pack then also measures the packers in it",
    )
    add(
        "--loader-peers",
        type=Path,
        metavar="PYTHON",
        help="Python of the environment that `make .loader-peers` installs, .loader-peers/bin/python; the "
        "stage peers needs it",
    )
    add("--resized-crops", action="store_true", help="take random resized crops in the stage peers")
    add(
        "--sweep",
        nargs="+",
        metavar=("SETTING", "VALUE"),
        help="measure one stage with each value of a setting",
    )
    add("--gates", action="store_true", help="exit with 1 if a gate is missed")
    add("--record", type=Path, metavar="FILE", help="append a line of JSON to this file as each stage ends")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="also write a profiler trace of a few training steps to this file",
    )
    options, rest = parser.parse_known_args()
    if options.sweep and (len(options.stages) > 1 or "all" in options.stages or len(options.sweep) < 2):
        parser.error("--sweep needs exactly one stage, a setting and at least one value")
    return options, rest


def chosen_stages(options: argparse.Namespace, device: str) -> list[str]:
    """Return the stages that were asked for; for `all`, those whose requirements are met.

    Raises SettingsError if those of a stage that was named are not.

    `forms` is only for GPUs: the fastest form of convolutions is already known for CPUs.
    """
    needs = {"peers": options.loader_peers, "pack": options.input}
    needs |= dict.fromkeys(("memory", "forms"), device == "cuda")
    every = [stage for stage in STAGES if needs.get(stage, True)]
    if "all" in options.stages:
        return every
    for stage in options.stages:
        if stage in NEEDS and not needs[stage]:
            raise SettingsError(f"{stage} needs {NEEDS[stage]}")
    return options.stages


def at_batches(stage: str, as_set: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield a label and settings for each batch size of a stage. as_set: use only the configured size."""
    if as_set or stage not in BATCHES:
        yield stage, []
    else:
        yield from ((f"{stage}, batch {batch}", ["--batch", str(batch)]) for batch in BATCHES[stage])


def swept(make: Callable[[list[str]], "Stages"], stage: str, sweep: list[str]) -> "Stage":
    """Return the first candidate of a stage with each value of a setting."""
    name, *values = sweep
    stages = {f"{name} {value}": getattr(make([f"--{name}", value]), stage)() for value in values}
    return {label: next(iter(candidates.values())) for label, candidates in stages.items()}


def measured(
    stage: str,
    label: str,
    candidates: Callable[[], "Stage"],
    options: argparse.Namespace,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a stage and print its lines; return its part of the record, under its label.

    If the candidates cannot be created at all, the error is recorded for "all".
    """
    begun = time.monotonic()
    try:
        figures, errors = in_turn(candidates(), options.runs, options.limit)
    except RuntimeError as error:
        figures, errors = {}, {"all": one_line(error)}
    took = round(time.monotonic() - begun, 1)
    unit = UNITS.get(stage, "images/s")
    judged = [] if options.sweep else list(judge(stage, figures, about))
    gates = (f"{label:17} gate: {judgement.line(unit)}" for judgement in judged)
    print(*table(label, figures, errors), *gates, f"{label:17} took {took:,} s", sep="\n", flush=True)
    part = {RECORDED[unit]: {label: figures}, "took_seconds": {label: took}}
    part |= {"gates": {label: [judgement.record() for judgement in judged]}} if judged else {}
    return part | ({"failed": {label: errors}} if errors else {})


def measure(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Measure the chosen stages and return the record; each stage's part is appended to --record at once.

    Raises SettingsError, DatasetError or OSError.
    """
    settings = with_initial_net(load_settings(rest, command=program()))
    read_data(settings.data)  # a missing dataset is reported before torch is imported

    from tools.benchmarks.stages import Stages
    from trainer.processes.distributed import join

    stages = Stages(settings, join(settings.device), options)

    def make(more: list[str]) -> Stages:
        """Make stages with other settings; the fastest decoding and convolutions are measured only once."""
        settings = with_initial_net(load_settings([*rest, *more], command=program()))
        found = stages.decoding
        share = found.hw_decoder_load if settings.hw_decoder_load is None else settings.hw_decoder_load
        decoding = {
            "threads": settings.threads or found.threads,
            "pipelines": settings.pipelines or found.pipelines,
            "hw_decoder_load": share,
        }
        return Stages(settings.model_copy(update=decoding), stages.world, options, stages)

    about = {"command": " ".join(sys.argv), **stages.describe(), "images_per_second": {}}
    about["environment"] = environment(stages.world.device_name)
    given = options.sweep or any(word.partition("=")[0] == "--batch" for word in rest)
    record = dict(about)
    for stage in chosen_stages(options, about["device"]):
        suffix = ", resized crops" if options.resized_crops and stage == "peers" else ""
        for name, more in at_batches(stage, bool(given) or about["device"] != "cpu"):
            label, at = name + suffix, make(more) if more else stages
            sweep = partial(swept, make, stage, options.sweep)
            with at.closing:
                part = measured(stage, label, sweep if options.sweep else getattr(at, stage), options, about)
            record |= {name: record.get(name, {}) | content for name, content in part.items()}
            about["convolutions"] = record["convolutions"] = at.convolutions
            if options.record:
                with open(options.record, "a") as file:
                    print(json.dumps(about | at.describe() | part), file=file)
    if options.trace:
        try:
            with stages.closing:
                stages.trace(options.trace)
        except RuntimeError as error:
            record["failed"] = record.get("failed", {}) | {"trace": {"all": one_line(error)}}
            print(f"trace   failed: {one_line(error)}")
    return record


def main() -> None:
    secure()
    exit_on_signals()
    options, rest = parse_arguments()
    try:
        for file in filter(None, (options.record, options.trace)):  # fail before measuring, not after
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        with nullcontext() if options.record else printed():
            record = measure(options, rest)
            print(json.dumps(record))
    except (SettingsError, DatasetError, OSError) as error:
        sys.exit(f"bench: {error}")
    missed = any(gate["verdict"] == "missed" for gates in record.get("gates", {}).values() for gate in gates)
    sys.exit("failed" in record or (missed and options.gates))


if __name__ == "__main__":
    main()
