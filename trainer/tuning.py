"""Find the load of the GPU's JPEG engine and the numbers of pipelines and threads that decode fastest.

They are measured at the first start and cached for later ones. Without a GPU, nothing is measured: one thread
per core was within noise of the best in every sweep (docs/benchmarks.md).
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from pipeline import Damage, Dataset
from pipeline.documents import ContentError, read_json
from pipeline.files import atomic_write
from pipeline.graph import release_unused_memory
from pipeline.loader import Decoding
from pipeline.locations import cache_folder
from pipeline.messages import one_line
from pipeline.stream import DecodingMemoryError
from trainer.build import build_loader
from trainer.environment import environment
from trainer.monitor.ceilings import loader_work, measure_throughput
from trainer.processes.distributed import World
from trainer.setting_groups import Fraction, Workers
from trainer.settings import Settings

T = TypeVar("T")
Choices = Mapping[str, Sequence[Any]]  # the values of Decoding to choose from

PIPELINES = (1, 2)  # a third one gained nothing on an H200 (docs/benchmarks.md)
# Fractions of the images that the engine decodes; threads and the GPU's cores decode the rest.
ENGINE_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 1.0)
SECONDS = 0.5  # how long to measure each candidate; a shorter time is too noisy


class _Cached(TypedDict):
    """An entry of decoding.json."""

    pipelines: Workers
    hw_decoder_load: Fraction
    threads: Workers


def tune(
    decoding: Decoding, settings: Settings, dataset: Dataset, world: World
) -> tuple[Decoding, list[str]]:
    """Return the decoding with the values that are fastest on this machine, and notes for the log.

    Values that the settings give are kept. Raises DatasetError, as the loader does.
    """
    threads = [decoding.threads]
    if not settings.threads:
        threads += [max(1, decoding.threads * part // 4) for part in (3, 2)]
    choices: Choices = {
        "pipelines": PIPELINES if settings.pipelines is None else (settings.pipelines,),
        "hw_decoder_load": ENGINE_SHARES if settings.hw_decoder_load is None else (settings.hw_decoder_load,),
        "threads": threads,
    }
    if decoding.device.type != "cuda" or all(len(values) == 1 for values in choices.values()):
        return decoding, []

    def images_per_second(candidate: Decoding) -> float:
        try:
            return measure(candidate, settings, dataset, world)
        except (DecodingMemoryError, RuntimeError) as error:  # for example, if two pipelines are too many
            warnings.warn(f"cannot decode with {candidate}: {one_line(error)}", stacklevel=2)
            return 0.0

    def measure_all() -> _Cached:
        # This reads the images from the disk, so that no measurement includes that.
        measure(decoding, settings, dataset, world)
        best = fastest(decoding, choices, images_per_second)
        release_unused_memory()
        return {
            "pipelines": best.pipelines,
            "hw_decoder_load": best.hw_decoder_load,
            "threads": best.threads,
        }

    about = environment(world.device_name)
    machine = [about[name] for name in ("device", "cpu", "cores", "nvidia-dali-cuda130")]
    work = [dataset.manifest.fingerprint, decoding.crop, settings.batch, world.size, choices]
    key, structure = json.dumps([machine, work]), TypeAdapter(_Cached)
    chosen, notes = load_or_measure("decoding.json", key, structure, measure_all, world.local_rank == 0)
    note = (
        f"decoding in {chosen['pipelines']} pipelines of {chosen['threads']} threads, "
        f"{chosen['hw_decoder_load']:.0%} on the JPEG engine"
    )
    return replace(decoding, **chosen), [note, *notes]


def fastest(decoding: Decoding, choices: Choices, images_per_second: Callable[[Decoding], float]) -> Decoding:
    """Return the decoding with the best value of each choice, chosen one after the other."""
    for name, values in choices.items():
        candidates = [replace(decoding, **{name: value}) for value in values]
        decoding = max(candidates, key=images_per_second) if len(values) > 1 else candidates[0]
    return decoding


def measure(
    decoding: Decoding, settings: Settings, dataset: Dataset, world: World, seconds: float = SECONDS
) -> float:
    """Measure the images/s that this process's loader delivers over the first steps of the run."""
    with build_loader(
        settings, dataset, decoding, rank=world.rank, world=world.size, on_damage=_ignore
    ) as loader:
        work = loader_work(iter(loader.batches(0)))
        # Skip the batches that were prepared in advance.
        for _ in range(decoding.pipelines * (decoding.prefetch + 1)):
            work()
        return measure_throughput(work, seconds, decoding.device)


def _ignore(_damage: Damage) -> None:
    """Ignore a damaged sample, which training will count and report."""


def load_or_measure(
    name: str, key: str, structure: TypeAdapter[T], measure: Callable[[], T], write: bool
) -> tuple[T, list[str]]:
    """Return the cached result for a key, or else the result of `measure`, and notes for the log.

    name: name of a JSON file in the cache folder. structure: structure of a result; a cached result without
    it is damaged, and measured again. write: whether to add a new result to the file. If the file cannot be
    read or written, a note says so.
    """
    found: T | None = None
    try:
        path = cache_folder() / name
        known = _read_cache(path)
        with suppress(ValidationError):
            return structure.validate_python(known.get(key)), []
        found = measure()
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(json.dumps({**known, key: found}, indent=1).encode())
    except OSError as error:
        notes = [
            f"measured again at the next start, as this cannot be cached: {error.filename}: {error.strerror}"
        ]
        return found or measure(), notes * write
    return found, []


def _read_cache(path: Path) -> dict[str, Any]:
    """Return the results in a file of the cache. Raises OSError if it cannot be read."""
    try:
        return read_json(path, TypeAdapter(dict[str, Any]))
    except (FileNotFoundError, ContentError):
        return {}  # there is no file yet, or it is damaged; both only cost another measurement
