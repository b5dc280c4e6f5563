"""Measure each stage on this machine: a table, then JSON on the last line.

    python tools/bench.py read loader --data shards
    python tools/bench.py all --data shards --input ILSVRC2012 --gates
    python tools/bench.py loader --data shards --sweep threads 1 2 4

    read    JPEG bytes out of the shards in the plan's order, beside DALI's own reader
    loader  read, decode, crop, mirror, normalise, beside DALI's own reader feeding the same graph
    peers   the loader beside others' loaders, of the environment --loader-peers
    model   forward, backward and update on a batch that lies ready, beside the net as torch has it
    forms   the model in the form of convolutions that is taken here, beside itself in the others
    train   the training loop, beside its loader alone and its model alone
    start   seconds from the command to the end of its first step
    memory  of the GPU, in GB, that training has taken by then
    save    seconds that a checkpoint holds training up, and until it is on the disk ($TMPDIR)
    pack    files of --input to shards, in one process and in all, beside others' of --pack-peers

On a CPU, loader and peers are measured at batch 32 and at 128, unless --batch says another. What is compared
runs by turns after a warm-up. A figure is the median of its runs, with the least and the greatest; a ratio is
the median over runs that stood side by side. What fails is a line, too, and the rest goes on; the exit code
is then 1. Other options are settings of alexnet-train (--batch, --recipe, --threads, …).

A gate is a goal of a stage: a ratio, or on a GPU an amount that an H200 shall reach. It is passed where the
median reaches the goal; else undecided where the median's 95 % interval does, and more --runs may decide it;
else missed. The interval is that of a bootstrap over the runs, with the same draws each time; of five runs or
fewer it is their range. --gates ends with 1 where a gate is missed, not where one is undecided.

A stage takes (runs + 1) × seconds for each of its lines, and what these compile or start. That is, unless
told otherwise, 90 s for read, 120 for loader and 540 for peers (half of it at one batch), 120 for model
(150 on a GPU), 180 for forms and 90 for train; the others last as long as what they do. Each says how long
it took.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError, read_manifest
from tools.benchmarks.gates import Figures, judge
from tools.options import count, positive, program
from trainer.run import environment
from trainer.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from tools.benchmarks.stages import Stage, Stages

STAGES = ("read", "loader", "peers", "model", "forms", "train", "start", "memory", "save", "pack")
UNITS = {"start": "s", "memory": "GB", "save": "s"}  # of the others, images/s
RECORDED = {"images/s": "images_per_second", "s": "seconds", "GB": "gigabytes"}
BATCHES = dict.fromkeys(("loader", "peers"), (32, 128))  # on a CPU, unless --batch says another

FAILURES = (RuntimeError, ValueError, OSError)  # of a contestant: no memory, CUDA, a trainer, the disk


def by_turns(stage: "Stage", runs: int, limit: float = math.inf) -> tuple[Figures, dict[str, str]]:
    """Each once to warm up, then all by turns: a machine that slows down slows all of them.

    Returns the figures, and errors of those that failed: they have no figures, and leave the stage with what
    they held. limit: seconds, within which a second round and more have to end.
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
                errors[name] = said(error)
                figures[name] = []
                del stage[name]
        now = time.monotonic()
        if number and now + (now - round_begun) > begun + limit:
            break
    return {name: values[1:] for name, values in figures.items()}, errors


def said(error: Exception) -> str:
    """An error in a line, of its end where it is long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def table(label: str, figures: Figures, errors: Mapping[str, str]) -> Iterator[str]:
    """A line for each contestant; ratios are to the first."""
    unit, first = UNITS.get(label, "images/s"), next(iter(figures.values()), [])
    digits = ",.3f" if unit == "s" else ",.1f"
    for name, error in errors.items():
        yield f"{label:18}{name:20}failed: {error}"
    for name, values in figures.items():
        if not values:
            continue
        spread = f"{min(values):{digits}} to {max(values):{digits}}"
        line = f"{label:18}{name:20}{median(values):>12{digits}} {unit:8}  {spread:24}"
        if first and values is not first:
            ratio = median(a / b for a, b in zip(first, values, strict=True))
            line += f"{next(iter(figures))} is {ratio:.2f} × this"
        yield line


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Also the settings that are left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("stages", nargs="+", choices=(*STAGES, "all"), metavar="stage", help="of those above, or all")
    add("--runs", type=count, default=5, metavar="N", help="runs that count, of each (default 5)")
    add("--seconds", type=positive, default=5.0, metavar="S", help="least length of a run (default 5)")
    add(
        "--limit",
        type=positive,
        default=math.inf,
        metavar="S",
        help="for a stage; only its first round may go beyond",
    )
    add("--input", type=Path, metavar="DIR", help="images for `pack`")
    add("--pack-peers", type=Path, metavar="PYTHON", help="of `make .pack-peers`: .pack-peers/bin/python")
    add("--loader-peers", type=Path, metavar="PYTHON", help="of `make .loader-peers`, likewise")
    add("--sweep", nargs="+", metavar=("SETTING", "VALUE"), help="the stage with each value of a setting")
    add("--gates", action="store_true", help="end with 1 if one is missed")
    add("--record", type=Path, metavar="FILE", help="append a line to this file as each stage ends")
    add("--trace", type=Path, metavar="FILE", help="write a profiler's trace of training there, too")
    options, rest = parser.parse_known_args()
    if options.sweep and (len(options.stages) > 1 or "all" in options.stages or len(options.sweep) < 2):
        parser.error("--sweep takes one stage, a setting and its values")
    return options, rest


def possible(options: argparse.Namespace, device: str) -> list[str]:
    """The stages that are asked for; of all, those for which everything is there. Which form of convolutions
    is fastest is settled for CPUs."""
    needs = {"peers": options.loader_peers, "pack": options.input}
    needs |= dict.fromkeys(("memory", "forms"), device == "cuda")
    every = [stage for stage in STAGES if needs.get(stage, True)]
    return every if "all" in options.stages else options.stages


def at_batches(stage: str, as_set: bool) -> Iterator[tuple[str, list[str]]]:
    """For each batch at which a stage is measured, a label and the setting. as_set: at that which is set."""
    if as_set or stage not in BATCHES:
        yield stage, []
    else:
        yield from ((f"{stage}, batch {batch}", ["--batch", str(batch)]) for batch in BATCHES[stage])


def swept(make: Callable[[list[str]], "Stages"], stage: str, sweep: list[str]) -> "Stage":
    """The first contestant of a stage, with each value of a setting."""
    name, *values = sweep
    stages = {f"{name} {value}": getattr(make([f"--{name}", value]), stage)() for value in values}
    return {label: next(iter(contestants.values())) for label, contestants in stages.items()}


def measured(
    stage: str,
    label: str,
    contestants: Callable[[], "Stage"],
    options: argparse.Namespace,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a stage and print its lines. Returns its part of the record, in which it has the label; that
    none of its contestants can be made is an error of "all"."""
    begun = time.monotonic()
    try:
        figures, errors = by_turns(contestants(), options.runs, options.limit)
    except RuntimeError as error:
        figures, errors = {}, {"all": said(error)}
    took = round(time.monotonic() - begun, 1)
    unit = UNITS.get(stage, "images/s")
    judged = [] if options.sweep else list(judge(stage, figures, about))
    gates = (f"{label:18}gate: {judgement.line(unit)}" for judgement in judged)
    print(*table(label, figures, errors), *gates, f"{label:18}took {took:,} s", sep="\n", flush=True)
    part = {RECORDED[unit]: {label: figures}, "took_seconds": {label: took}}
    part |= {"gates": {label: [judgement.record() for judgement in judged]}} if judged else {}
    return part | ({"failed": {label: errors}} if errors else {})


def measure(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The record. What a stage adds to it is appended to --record at once. Raises SettingsError, DatasetError
    or OSError."""
    settings = load_settings(rest, command=program())
    read_manifest(settings.data)  # what is wrong is said before torch is there

    from tools.benchmarks.stages import Stages
    from trainer.processes.distributed import join

    stages = Stages(settings, join(settings.device), options)

    def make(more: list[str]) -> Stages:
        """With other settings; how to decode and to convolve is measured once, for the first."""
        settings, found = load_settings([*rest, *more], command=program()), stages.decoding
        share = found.hw_decoder_load if settings.hw_decoder_load is None else settings.hw_decoder_load
        decoding = {"threads": settings.threads or found.threads, "hw_decoder_load": share}
        return Stages(settings.model_copy(update=decoding), stages.world, options, stages)

    about = {"command": " ".join(sys.argv), **stages.describe(), "images_per_second": {}}
    about["environment"] = environment(stages.world.device_name)
    given = options.sweep or any(word.partition("=")[0] == "--batch" for word in rest)
    record = dict(about)
    for stage in possible(options, about["device"]):
        for label, more in at_batches(stage, bool(given) or about["device"] != "cpu"):
            at = make(more) if more else stages
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
            stages.trace(options.trace)
        except RuntimeError as error:
            record["failed"] = record.get("failed", {}) | {"trace": {"all": said(error)}}
            print(f"trace   failed: {said(error)}")
    return record


def main() -> None:
    options, rest = parse_arguments()
    try:
        for file in filter(None, (options.record, options.trace)):  # not after all the work
            file.parent.mkdir(parents=True, exist_ok=True)
        record = measure(options, rest)
    except (SettingsError, DatasetError, OSError) as error:
        sys.exit(f"bench: {error}")
    print(json.dumps(record))
    missed = any(gate["verdict"] == "missed" for gates in record.get("gates", {}).values() for gate in gates)
    sys.exit("failed" in record or (missed and options.gates))


if __name__ == "__main__":
    main()
