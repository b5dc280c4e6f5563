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

What is compared runs by turns after a warm-up. A figure is the median of its runs, with the least and
the greatest; a ratio is the median over runs that stood side by side. What fails is a line, too, and the
rest goes on; the exit code is then 1. --gates ends with 1 also where a ratio is below what it has been, or
on a GPU an amount short of what an H200 shall do, by more than a shared machine's noise. Other options are
settings of alexnet-train (--batch, --recipe, --threads, …).

A stage takes (runs + 1) × seconds for each of its lines, and what these compile or start. That is, unless
told otherwise, 90 s for read, 60 for loader, 270 for peers, 90 for model (180 on a GPU), 180 for forms and 90
for train; the others last as long as what they do. Each says how long it took.
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
from typing import TYPE_CHECKING, Any, NamedTuple

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError, read_manifest
from tools.options import count, positive
from trainer.run import environment
from trainer.settings import SettingsError, load_settings

if TYPE_CHECKING:
    from tools.benchmarks.stages import Stage, Stages

STAGES = ("read", "loader", "peers", "model", "forms", "train", "start", "memory", "save", "pack")
UNITS = {"start": "s", "memory": "GB", "save": "s"}  # of the others, images/s
RECORDED = {"images/s": "images_per_second", "s": "seconds", "GB": "gigabytes"}
NOISE = 0.9  # of a gate, which has to be reached

FAILURES = (RuntimeError, ValueError, OSError)  # of a contestant: no memory, CUDA, a trainer, the disk

Figures = dict[str, list[float]]  # of each contestant, a figure a run


class Gate(NamedTuple):
    """What the first contestant of a stage has to reach: a multiple of others, or on a GPU an amount."""

    stage: str
    goal: float
    others: tuple[str, ...] = ()
    pick: Callable[..., float] = max  # which of several others counts
    device: str = ""  # where the gate stands; any
    geometry: str = ""  # likewise
    at_most: bool = False

    def stands(self, device: str, geometry: str) -> bool:
        return self.device in ("", device) and self.geometry in ("", geometry)

    def passes(self, reached: float) -> bool:
        return reached <= self.goal / NOISE if self.at_most else reached >= self.goal * NOISE

    def reached(self, figures: Figures) -> float | None:
        """None where it was not measured, or nothing to compare with."""
        ours = next(iter(figures.values()), [])
        theirs = [figures[name] for name in self.others if figures.get(name)]
        if not ours or (self.others and not theirs):
            return None
        return median(a / self.pick(b, default=1.0) for a, *b in zip(ours, *theirs, strict=True))


GATES = (
    Gate("read", 1.0, ("DALI's reader",)),
    Gate("loader", 1.0, ("DALI's reader",)),
    Gate("loader", 50_000, device="cuda", geometry="256"),
    Gate("loader", 15_000, device="cuda", geometry="original"),
    Gate("peers", 2.0, ("pytorch", "timm", "webdataset", "spdl", "litdata", "streaming")),
    Gate("peers", 1.0, ("ffcv",)),  # the goal is 2.0
    Gate("model", 1.5, ("stock NCHW", "stock channels_last")),
    Gate("model", 80_000, device="cuda"),
    Gate("start", 25, device="cuda", at_most=True),
    Gate("memory", 8, device="cuda", at_most=True),
    Gate("train", 0.97, ("loader alone", "model alone"), pick=min),
    Gate("pack", 1.4, ("shardwriter",)),
    Gate("pack", 1.0, ("img2dataset",)),
)


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


def table(stage: str, figures: Figures, errors: Mapping[str, str]) -> Iterator[str]:
    """A line for each contestant; ratios are to the first."""
    unit, first = UNITS.get(stage, "images/s"), next(iter(figures.values()), [])
    digits = ",.3f" if unit == "s" else ",.1f"
    for name, error in errors.items():
        yield f"{stage:8}{name:20}failed: {error}"
    for name, values in figures.items():
        if not values:
            continue
        spread = f"{min(values):{digits}} to {max(values):{digits}}"
        line = f"{stage:8}{name:20}{median(values):>12{digits}} {unit:8}  {spread:24}"
        if first and values is not first:
            ratio = median(a / b for a, b in zip(first, values, strict=True))
            line += f"{next(iter(figures))} is {ratio:.2f} × this"
        yield line


def judge(results: dict[str, Figures], device: str, geometry: str = "256") -> tuple[list[str], bool]:
    """A line for each gate that was measured, and whether all were passed."""
    lines, passed = [], True
    for gate in GATES:
        if gate.stage not in results or not gate.stands(device, geometry):
            continue
        reached = gate.reached(results[gate.stage])
        if reached is None:
            continue
        passed &= gate.passes(reached)
        unit = UNITS.get(gate.stage, "images/s")
        of = f"× {gate.pick.__name__} of {', '.join(gate.others)}" if gate.others else unit
        limit = f"at {'most' if gate.at_most else 'least'} {gate.goal:,g}"
        verdict = "passed" if gate.passes(reached) else "MISSED"
        lines.append(f"gate    {gate.stage:8}{reached:,.2f} {of}; {limit}: {verdict}")
    return lines, passed


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
    add("--gates", action="store_true", help="end with 1 if a gate is missed")
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


def swept(make: Callable[[list[str]], "Stages"], stage: str, sweep: list[str]) -> "Stage":
    """The first contestant of a stage, with each value of a setting."""
    name, *values = sweep
    stages = {f"{name} {value}": getattr(make([f"--{name}", value]), stage)() for value in values}
    return {label: next(iter(contestants.values())) for label, contestants in stages.items()}


def measured(
    contestants: Callable[[], "Stage"], options: argparse.Namespace
) -> tuple[Figures, dict[str, str], float]:
    """As by_turns, but that none can be made is an error of "all"; and the seconds it took."""
    begun = time.monotonic()
    try:
        figures, errors = by_turns(contestants(), options.runs, options.limit)
    except RuntimeError as error:
        figures, errors = {}, {"all": said(error)}
    return figures, errors, round(time.monotonic() - begun, 1)


def measure(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], bool]:
    """The record, and whether nothing failed and all gates were passed. What a stage adds to the record is
    appended to --record at once. Raises SettingsError, DatasetError or OSError."""
    settings = load_settings(rest, command="bench.py")
    read_manifest(settings.data)  # what is wrong is said before torch is there

    from tools.benchmarks.stages import Stages
    from trainer.distributed import join

    stages = Stages(settings, join(settings.device), options)

    def make(more: list[str]) -> Stages:
        """With other settings; how to decode and to convolve is measured once, for the first."""
        settings, found = load_settings([*rest, *more], command="bench.py"), stages.decoding
        share = found.hw_decoder_load if settings.hw_decoder_load is None else settings.hw_decoder_load
        decoding = {"threads": settings.threads or found.threads, "hw_decoder_load": share}
        return Stages(settings.model_copy(update=decoding), stages.world, options, stages)

    about = {"command": " ".join(sys.argv), **stages.describe(), "images_per_second": {}}
    about["environment"] = environment(stages.world.device_name)
    record, results = dict(about), {}
    for stage in possible(options, stages.device.type):
        sweep = partial(swept, make, stage, options.sweep)
        figures, errors, took = measured(sweep if options.sweep else getattr(stages, stage), options)
        print(*table(stage, figures, errors), f"{stage:8}took {took:,} s", sep="\n", flush=True)
        part = {RECORDED[UNITS.get(stage, "images/s")]: {stage: figures}, "took_seconds": {stage: took}}
        part |= {"failed": {stage: errors}} if errors else {}
        record |= {name: record.get(name, {}) | content for name, content in part.items()}
        about["convolutions"] = record["convolutions"] = stages.convolutions
        if options.record:
            with open(options.record, "a") as file:
                print(json.dumps(about | part), file=file)
        results[stage] = figures
    if options.trace:
        try:
            stages.trace(options.trace)
        except RuntimeError as error:
            record["failed"] = record.get("failed", {}) | {"trace": {"all": said(error)}}
            print(f"trace   failed: {said(error)}")
    lines, passed = judge({} if options.sweep else results, stages.device.type, about["geometry"])
    print(*lines, sep="\n", end="\n" if lines else "")
    return record, "failed" not in record and (passed or not options.gates)


def main() -> None:
    options, rest = parse_arguments()
    try:
        for file in filter(None, (options.record, options.trace)):  # not after all the work
            file.parent.mkdir(parents=True, exist_ok=True)
        record, good = measure(options, rest)
    except (SettingsError, DatasetError, OSError) as error:
        sys.exit(f"bench: {error}")
    print(json.dumps(record))
    sys.exit(not good)


if __name__ == "__main__":
    main()
