"""With how many threads, and how much of the GPU's JPEG engine, this machine decodes a dataset fastest.

Measured at the first start and remembered for the next ones. Without a GPU nothing is measured: one
thread a core has been within the noise of the best wherever it was swept (docs/benchmarks.md).
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checked import Damage
from pipeline.files import atomic_write
from pipeline.loader import Dataset, Decoding, train_loader
from pipeline.plan import Plan
from pipeline.retry import read_patiently
from trainer.monitor.ceilings import loader_work, rate
from trainer.processes.distributed import World
from trainer.run import environment
from trainer.settings import Settings

ENGINE_SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)  # the rest is for the threads and the GPU's cores
SECONDS = 0.5  # for which each is measured; less is noise


def tuned(
    decoding: Decoding, settings: Settings, dataset: Dataset, plan: Plan, world: World
) -> tuple[Decoding, list[str]]:
    """The decoding with what is fastest here, and what there is to say of it.

    What the settings fix stays. Raises DatasetError, as the loader does.
    """
    threads = [decoding.threads]
    if not settings.threads:
        threads += [max(1, decoding.threads * part // 4) for part in (3, 2)]
    shares = ENGINE_SHARES if settings.hw_decoder_load is None else (settings.hw_decoder_load,)
    if decoding.device.type != "cuda" or len(threads) == len(shares) == 1:
        return decoding, []

    def images_per_second(candidate: Decoding) -> float:
        return measure(candidate, dataset, plan, world)

    def find() -> dict[str, Any]:
        images_per_second(decoding)  # so that none pays for the disk
        best = fastest(decoding, shares, threads, images_per_second)
        return {"threads": best.threads, "hw_decoder_load": best.hw_decoder_load}

    about = environment(world.device_name)
    machine = [about[name] for name in ("device", "cpu", "cores", "nvidia-dali-cuda130")]
    work = [dataset.manifest.fingerprint, decoding.crop, plan.batch, world.size, threads, shares]
    chosen, notes = remembered("decoding.json", json.dumps([machine, work]), find, world.local_rank == 0)
    said = f"decoding with {chosen['threads']} threads and {chosen['hw_decoder_load']:.0%} on the JPEG engine"
    return replace(decoding, **chosen), [said, *notes]


def fastest(
    decoding: Decoding,
    shares: Iterable[float],
    threads: Iterable[int],
    images_per_second: Callable[[Decoding], float],
) -> Decoding:
    """The best share of the engine with the threads as they are, then the best number of threads with it."""
    best = max((replace(decoding, hw_decoder_load=share) for share in shares), key=images_per_second)
    return max((replace(best, threads=count) for count in threads), key=images_per_second)


def measure(decoding: Decoding, dataset: Dataset, plan: Plan, world: World) -> float:
    """Images/s of this process's loader over the first steps of the run."""
    batches = train_loader(
        dataset, plan, range(sys.maxsize), decoding, rank=world.rank, world=world.size, leave_out=_pass_over
    )
    work = loader_work(batches)
    for _ in range(decoding.prefetch + 1):  # what was made while nothing was measured
        work()
    return rate(work, SECONDS, decoding.device)


def _pass_over(_damage: Damage) -> None:
    """Training counts what is damaged, and says so."""


def cache_folder() -> Path:
    """Where what was measured on this machine is kept. Raises FileNotFoundError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet-train"
    except RuntimeError:
        raise FileNotFoundError(
            errno.ENOENT, "this user has no home: set XDG_CACHE_HOME", "alexnet-train"
        ) from None


def remembered(
    name: str, key: str, find: Callable[[], dict[str, Any]], write: bool
) -> tuple[dict[str, Any], list[str]]:
    """What a file in the cache holds under a key, else what `find` finds, written there if it can be; and
    notes."""
    found: dict[str, Any] = {}
    try:
        path = cache_folder() / name
        known = _known(path)
        if key in known:
            return known[key], []
        found = find()
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(json.dumps({**known, key: found}, indent=1).encode())
    except OSError as error:
        notes = [f"this is measured again at the next start: {error.filename}: {error.strerror}"]
        return found or find(), notes * write
    return found, []


def _known(path: Path) -> dict[str, Any]:
    """What was found before. Raises OSError where that cannot be read."""
    try:
        known = json.loads(read_patiently(path))
    except (FileNotFoundError, ValueError):
        return {}  # none yet, or one that was cut short: it can be found again
    return known if isinstance(known, dict) else {}
