"""Measure images/s of each stage on this machine: a table, then JSON on the last line.

    python tools/bench.py loader --data shards
    python tools/bench.py all --data shards --input ILSVRC2012 --batch 32

    read    JPEG bytes out of the mapped shards in the plan's order, beside DALI's own reader
    loader  read, decode, crop, mirror, normalise, beside DALI's own reader feeding the same graph
    model   forward, backward and update on a batch that lies ready, in each precision
    train   the training loop, beside its loader alone and its model alone
    pack    image files to shards, in one process and in all; with --peers, beside others' packing

What is compared runs by turns in one process after a warm-up. A figure is the median of its runs,
with the least and the greatest; a ratio is the median over runs that stood side by side. Other
options are settings of alexnet-train (--batch, --recipe, --threads, …).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.manifest import DatasetError, read_manifest
from trainer.run import Run, environment
from trainer.settings import Settings, SettingsError, load_settings

Stage = dict[str, Callable[[], float]]  # what is compared: each does one run and returns its images/s


def by_turns(stage: Stage, runs: int) -> dict[str, list[float]]:
    """Each once to warm up, then all by turns: a machine that slows down slows all of them."""
    for run in stage.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in stage}
    for _ in range(runs):
        for name, run in stage.items():
            rates[name].append(run())
    return rates


class Bench:
    """The stages on one dataset with one group of settings."""

    def __init__(self, settings: Settings, seconds: float, images: Path | None, peers: Path | None = None):
        from pipeline.loader import Dataset, graph_options
        from pipeline.plan import Plan
        from trainer.build import build_decoding
        from trainer.distributed import join

        self.settings, self.seconds, self.images, self.peers = settings, seconds, images, peers
        self.world = join(settings.device)
        self.device = self.world.device
        self.dataset = Dataset(settings.data)
        self.decoding = build_decoding(settings, self.device)
        self.options = graph_options(self.dataset.manifest, self.decoding, settings.batch)
        shards = self.dataset.manifest.split("train").shards
        self.plan = Plan(settings.seed, settings.batch, tuple(shard.samples for shard in shards))

    def _run(self, work: Callable[[], int]) -> Callable[[], float]:
        from trainer.ceilings import rate

        return lambda: rate(work, self.seconds, self.device)

    def _loader(self) -> Callable[[], int]:
        from pipeline.loader import train_loader
        from trainer.ceilings import loader_work

        endless = range(sys.maxsize)
        return loader_work(
            train_loader(self.dataset, self.plan, endless, self.decoding, colour=self.settings.colour)
        )

    def read(self) -> Stage:
        from tools import peers

        steps = iter(range(sys.maxsize))
        reader = self.dataset.reader("train")
        plan = peers.external_source_bytes(
            reader, lambda: self.plan.step_batch(next(steps)).samples, self.options
        )
        return {
            "plan": self._run(plan),
            "DALI's reader": self._run(peers.dali_reader_bytes(self.dataset, self.options)),
        }

    def loader(self) -> Stage:
        from tools import peers

        return {
            "loader": self._run(self._loader()),
            "DALI's reader": self._run(peers.dali_reader_images(self.dataset, self.options)),
        }

    def _model(self, precision: str) -> Callable[[], int]:
        from trainer.ceilings import model_work

        classes = len(self.dataset.manifest.classes)
        return model_work(self.settings, classes, self.decoding, self.settings.batch, precision)

    def model(self) -> Stage:
        return {precision: self._run(self._model(precision)) for precision in ("fp32", "bf16")}

    def train(self) -> Stage:
        from trainer.metrics import Metrics
        from trainer.step import resolve_precision
        from trainer.train import Trainer

        run = Run(Path(tempfile.mkdtemp(prefix="alexnet-bench-")) / "run")
        settings = self.settings.model_copy(update={"epochs": 10**9})
        trainer = Trainer(settings, run, self.world, Metrics(), port=None)
        batches = trainer.batches()

        def work() -> int:
            trainer.train_one(batches)
            return settings.batch

        return {
            "train": self._run(work),
            "loader alone": self._run(self._loader()),
            "model alone": self._run(self._model(resolve_precision(settings.precision, self.device))),
        }

    def pack(self) -> Stage:
        if self.images is None:
            raise SettingsError("pack needs --input: a folder of images to pack")
        from tools.make_shards import pack, parse_arguments

        workers = self.decoding.threads

        def ours(workers: int, *arguments: str) -> float:
            with tempfile.TemporaryDirectory() as folder:
                where = ["--input", str(self.images), "--output", folder, "--workers", str(workers)]
                options = parse_arguments([*where, "--shard-samples", "500", *arguments])
                start = time.perf_counter()
                manifest = pack(options)
                seconds = time.perf_counter() - start
            return sum(split.samples for split in manifest.splits.values()) / seconds

        def theirs(peer: str) -> float:
            with tempfile.TemporaryDirectory() as folder:
                where = ["--input", str(self.images), "--output", folder, "--workers", str(workers)]
                command = [str(self.peers), str(Path(__file__).with_name("pack_peers.py")), peer, *where]
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                seconds = time.perf_counter() - start
            if done.returncode:
                raise SettingsError(f"--peers {self.peers} cannot run {peer}: {done.stderr.strip()[-300:]}")
            return int(done.stdout.split()[-1]) / seconds

        stage: Stage = {f"{workers} processes": partial(ours, workers), "1 process": partial(ours, 1)}
        if self.peers:
            stage |= {peer: partial(theirs, peer) for peer in ("shardwriter", "img2dataset")}
            original = partial(ours, workers, "--geometry", "original")
            stage |= {"original": original, "headers": partial(original, "--check", "headers")}
            stage |= {"copy": partial(theirs, "copy")}
        return stage


STAGES = ("read", "loader", "model", "train", "pack")


def table(stage: str, rates: dict[str, list[float]]) -> Iterator[str]:
    """A line for each contestant; ratios are to the first."""
    first = next(iter(rates.values()))
    for name, values in rates.items():
        ratio = median(a / b for a, b in zip(first, values, strict=True))
        spread = f"{min(values):,.1f} to {max(values):,.1f}"
        line = f"{stage:8}{name:16}{median(values):>12,.1f} images/s   {spread:24}"
        yield line if values is first else f"{line}{next(iter(rates))} is {ratio:.2f} × this"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument(
        "--runs", type=int, default=5, metavar="N", help="runs that count, of each (default 5)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="least length of a run (default 5)"
    )
    parser.add_argument("--input", type=Path, metavar="DIR", help="images for `pack`")
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="of an environment for pack_peers.py: .peers/bin/python"
    )
    options, rest = parser.parse_known_args()
    results: dict[str, Any] = {}
    try:
        settings = load_settings(rest, command="bench.py")
        read_manifest(settings.data)
        bench = Bench(settings, options.seconds, options.input, options.peers)
        chosen = (
            [options.stage] if options.stage != "all" else [s for s in STAGES if s != "pack" or options.input]
        )
        for stage in chosen:
            results[stage] = by_turns(getattr(bench, stage)(), options.runs)
            print(*table(stage, results[stage]), sep="\n", flush=True)
    except (SettingsError, DatasetError, OSError) as error:
        sys.exit(f"bench: {error}")
    record = {
        "command": " ".join(sys.argv),
        "batch": settings.batch,
        "crop": settings.crop,
        "geometry": bench.dataset.manifest.geometry,
        "environment": environment(bench.world.device_name),
        "images_per_second": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
