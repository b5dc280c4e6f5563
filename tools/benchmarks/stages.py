"""The candidates that each stage of `alexnet-train bench` measures."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model.forms import FORMS
from pipeline import Dataset, Loader
from pipeline.loader import graph_options, synthetic_loader
from pipeline.names import ROOT
from trainer.build import build_decoding, build_loader
from trainer.forms import fastest_form
from trainer.monitor.ceilings import Work, loader_work, measure_throughput, model_work
from trainer.monitor.metrics import Metrics
from trainer.precision import resolve_precision
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.settings import Settings, SettingsError
from trainer.train import Trainer
from trainer.tuning import tune

Stage = dict[str, Callable[[], float]]  # by candidate: each call does one run and returns its figure

TRACED = 10  # steps


class Stages:
    """The stages for one dataset and one group of settings.

    options: command-line options that the stages use. first: the first stages of a sweep, whose open dataset
    and form of convolutions the others reuse. closing: closes what a stage has started.
    """

    def __init__(
        self, settings: Settings, world: World, options: argparse.Namespace, first: "Stages | None" = None
    ):
        self.settings, self.world, self.seconds, self.first = settings, world, options.seconds, first
        self.images: Path | None = options.input
        self.loader_peers: Path | None = options.loader_peers
        self.pack_peers: Path | None = options.pack_peers
        self.resized_crops: bool = options.resized_crops
        self.device = world.device
        self.closing: ExitStack = first.closing if first else ExitStack()
        if first and first.settings.data == settings.data:
            self.dataset: Dataset = first.dataset
        else:
            self.dataset = Dataset(settings.data, cache=settings.cache_options)
        self.classes = len(self.dataset.manifest.classes)
        decoding = build_decoding(settings, self.device)
        self.decoding, _ = tune(decoding, settings, self.dataset, world)
        self.options = graph_options(self.dataset.manifest, self.decoding, settings.batch)

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on, apart from the machine."""
        return {
            "device": self.device.type,
            "amx": torch.cpu._is_amx_tile_supported(),
            "batch": self.settings.batch,
            "crop": self.settings.crop,
            "geometry": self.dataset.manifest.geometry,
            "precision": resolve_precision(self.settings.precision, self.device),
            "threads": self.decoding.threads,
            "pipelines": self.decoding.pipelines,
            "hw_decoder_load": self.decoding.hw_decoder_load,
        }

    @property
    def convolutions(self) -> str:
        """The chosen form, or `auto` until a stage has trained."""
        return vars(self).get("_settled", self.settings).convolutions

    def _run(self, make: Callable[[], Work]) -> Callable[[], float]:
        """Return a run whose first call creates the work, so that work which never runs is never created."""
        make = cache(make)
        return lambda: measure_throughput(make(), self.seconds, self.device)

    def _train_loader(self, scale: tuple[float, float] | None = None) -> Loader:
        """Return a new loader. scale: if given, it takes random resized crops."""
        return build_loader(self.settings, self.dataset, self.decoding, scale=scale)

    def _loader(self) -> Work:
        return loader_work(iter(self._train_loader().batches(0)))

    @cached_property
    def _settled(self) -> Settings:
        """The settings, with `auto` resolved as for a run that starts on this machine."""
        precision = resolve_precision(self.settings.precision, self.device)
        settings = self.settings.model_copy(update={"precision": precision})
        if self.first and settings.convolutions == "auto":
            form = self.first._settled.form
        else:
            form, _ = fastest_form(settings, self.world)
        return settings.model_copy(update={"convolutions": form})

    def _model(self, precision: str, mode: str | None = None, form: str | None = None) -> Work:
        settings = self._settled.model_copy(update={"convolutions": form or self._settled.form})
        return model_work(settings, self.classes, self.decoding, settings.batch, precision, mode)

    def _folder(self) -> Path:
        """Make a temporary folder that is deleted when the stage ends."""
        return Path(self.closing.enter_context(TemporaryDirectory(prefix="alexnet-bench-")))

    def _trainer(self) -> Work:
        run = Run(self._folder() / "run")
        settings = self._settled.model_copy(update={"epochs": 10**9})
        run.folder.mkdir()
        trainer = Trainer(settings, run, self.world, Metrics(), port=None)
        trainer.display.silent = True
        batches = trainer.batches()

        def work() -> int:
            trainer.train_step(batches)
            if trainer.step % settings.log_every == 0:
                trainer.log()
            return settings.batch

        return work

    def read(self) -> Stage:
        from tools.benchmarks import dali_peers

        steps = iter(range(sys.maxsize))
        reader, sequence = self.dataset.reader("train"), self._train_loader().plan
        plan = partial(
            dali_peers.external_source_bytes,
            reader,
            lambda: sequence.step_samples(next(steps)),
            self.options,
        )
        theirs = partial(dali_peers.dali_reader_bytes, self.dataset, self.options)
        return {
            "plan": self._run(plan),
            "DALI's reader": self._run(partial(theirs, mapped=False)),
            "DALI's, mapped": self._run(partial(theirs, mapped=True)),
        }

    def loader(self) -> Stage:
        from tools.benchmarks import dali_peers

        theirs = partial(dali_peers.dali_reader_images, self.dataset, self.options)
        return {"loader": self._run(self._loader), "DALI's reader": self._run(theirs)}

    def peers(self) -> Stage:
        from tools.benchmarks import loader_peers
        from tools.benchmarks.peer_job import SCALE, Job
        from tools.benchmarks.peer_pipelines import PEERS

        assert self.loader_peers is not None
        device = self.device.type
        batches = iter(self._train_loader(SCALE if self.resized_crops else None).batches(0))
        stage: Stage = {"loader": partial(loader_peers.rate, batches, self.seconds, device)}
        job = Job(
            Path(self.settings.data),
            self.settings.batch,
            self.settings.crop,
            self.decoding.threads,
            device,
            resized_crops=self.resized_crops,
        )
        for name in PEERS:
            python = Path(sys.executable) if name == "dali" else self.loader_peers
            try:
                peer = loader_peers.Peer(python, name, job, self.seconds)
            except loader_peers.PeerError as error:
                print(f"peers   not measured: {error}", file=sys.stderr)
                continue
            stage[name] = peer.measure
            self.closing.callback(peer.close)
        return stage

    def model(self) -> Stage:
        from tools.benchmarks.stock import LAYOUTS, stock_work

        precision = resolve_precision(self.settings.precision, self.device)
        stage = {precision: self._run(partial(self._model, precision))}
        if self.settings.compile and self.device.type == "cuda":
            stage["with CUDA graphs"] = self._run(partial(self._model, precision, "reduce-overhead"))
        pixels, labels = next(synthetic_loader(self.settings.batch, self.classes, self.decoding))
        stock = partial(stock_work, pixels, labels, self.classes, precision=precision)
        stage |= {f"stock {layout}": self._run(partial(stock, layout=layout)) for layout in LAYOUTS}
        if shutil.which(os.environ.get("CXX", "g++")):  # torch's compiler needs it on CPUs and GPUs
            stage["stock compiled"] = self._run(partial(stock, layout="channels_last", compiled=True))
        return stage

    def forms(self) -> Stage:
        precision, ours = self._settled.precision, self._settled.form
        forms = sorted(FORMS, key=lambda form: form != ours)
        return {form: self._run(partial(self._model, precision, form=form)) for form in forms}

    def train(self) -> Stage:
        precision = resolve_precision(self.settings.precision, self.device)
        return {
            "train": self._run(self._trainer),
            "loader alone": self._run(self._loader),
            "model alone": self._run(partial(self._model, precision)),
        }

    def trace(self, path: Path) -> None:
        """Write a trace of host and device over a few training steps, for chrome://tracing or Perfetto."""
        work = self._trainer()
        for _ in range(3):  # warm-up
            work()
        with torch.profiler.profile() as profile:
            for _ in range(TRACED):
                work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        profile.export_chrome_trace(str(path))

    def start(self) -> Stage:
        """Measure seconds from the command to the end of its first step, with warm and cold caches."""
        if not self.settings.compile:
            return {"start": lambda: self._first_step(None)[0]}
        cache = str(self._folder())
        return {"warm": lambda: self._first_step(cache)[0], "cold": lambda: self._first_step(None)[0]}

    def memory(self) -> Stage:
        """Measure the GPU memory in GB that training takes, including DALI's and the driver's."""
        return {"memory": lambda: self._first_step(None)[1] / 1e9}

    def _taken(self) -> int:
        """Return the bytes of GPU memory in use by all processes."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def _first_step(self, cache: str | None) -> tuple[float, int]:
        """Return the seconds until the first step is done, and the bytes of GPU memory in use then."""
        with TemporaryDirectory(prefix="alexnet-bench-") as folder:
            recipe, log = Path(folder, "settings.toml"), Path(folder, "log")
            given = self.settings.model_dump(mode="json", exclude_none=True, exclude={"out", "recipe"})
            given |= {"log_every": 1, "port": 0}
            recipe.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in given.items()))
            command = [sys.executable, "-m", f"{ROOT}trainer.cli"]
            command += ["--recipe", str(recipe), "--out", f"{folder}/run"]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache or f"{folder}/cache"}
            start, before = time.perf_counter(), self._taken()
            with open(log, "w") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            while " step 1/" not in log.read_text() and process.poll() is None:
                time.sleep(0.01)
            seconds, taken = time.perf_counter() - start, self._taken() - before
            process.kill()
            process.wait()
            if " step 1/" not in log.read_text():
                raise SettingsError(f"training did not start: {log.read_text().strip()[-300:]}")
        return seconds, taken

    def save(self) -> Stage:
        """Measure seconds that saving delays training, and seconds until the checkpoint is on the disk."""
        folder = self._folder()
        trainer = Trainer(self.settings, Run(folder), self.world, Metrics(), port=None)
        trainer.train_step(trainer.batches())  # creates the momentum to save

        def background(only_delay: bool) -> float:
            start = time.perf_counter()
            trainer.saver.save(trainer.state())
            stall = time.perf_counter() - start
            trainer.saver.drain()
            return stall if only_delay else time.perf_counter() - start

        def in_line() -> float:
            start = time.perf_counter()
            with open(folder / "in-line.pt", "wb") as file:
                torch.save(trainer.state(), file)
                file.flush()
                os.fsync(file.fileno())
            return time.perf_counter() - start

        return {
            "stall": partial(background, True),
            "until on the disk": partial(background, False),
            "torch.save in line": in_line,
        }

    def pack(self) -> Stage:
        assert self.images is not None
        workers = self.decoding.threads
        stage: Stage = {
            f"{workers} processes": partial(self._pack, workers),
            "1 process": partial(self._pack, 1),
        }
        if self.pack_peers:
            stage |= {
                peer: partial(self._pack_of_peer, peer, workers) for peer in ("shardwriter", "img2dataset")
            }
            original = partial(self._pack, workers, geometry="original")
            stage |= {"original": original, "headers": partial(original, check="headers")}
            stage |= {"copy": partial(self._pack_of_peer, "copy", workers)}
        return stage

    def _pack(self, workers: int, **how: Any) -> float:
        from pipeline.packing.options import PackingOptions
        from pipeline.packing.pack import pack

        with TemporaryDirectory() as folder:
            options = PackingOptions(str(self.images), folder, shard_samples=500, workers=workers, **how)
            start = time.perf_counter()
            manifest = pack(options)
            seconds = time.perf_counter() - start
        return sum(split.samples for split in manifest.splits.values()) / seconds

    def _pack_of_peer(self, peer: str, workers: int) -> float:
        with TemporaryDirectory() as folder:
            where = ["--input", str(self.images), "--out", folder, "--workers", str(workers)]
            command = [str(self.pack_peers), str(Path(__file__).with_name("pack_peers.py")), peer, *where]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - start
        if done.returncode:
            raise SettingsError(
                f"--pack-peers {self.pack_peers} cannot run {peer}: {done.stderr.strip()[-300:]}"
            )
        return int(done.stdout.split()[-1]) / seconds


def _toml(value: Any) -> str:
    """Return a setting's value, as JSON has it, in TOML, whose inline tables differ from JSON's objects."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)} = {json.dumps(each)}' for name, each in value.items())}}}"
    return json.dumps(value)
