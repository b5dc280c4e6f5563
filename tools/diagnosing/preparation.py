"""What `alexnet-train doctor` finds out about the dataset, the run folder and the ports of a run."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import machine
from pipeline.dataset import Dataset
from pipeline.mixture import read_data
from pipeline.reader import ShardReader
from pipeline.remote_errors import redact
from tools.diagnosing.findings import Finding, size
from trainer.preflight import check_ports
from trainer.run import Run
from trainer.settings import Settings

_COLD_SECONDS = 3.0  # how long to read from the disk
_COLD_BYTES = 1 << 30  # at most
_BATCH = 128  # images
_OTHER_FILES = 64  # open files of a run besides its shards, with some to spare


class Data(NamedTuple):
    """What a forecast needs to know about a dataset.

    train, val: number of images. image_bytes: mean size of a JPEG. stays_in_memory: whether later epochs read
    nothing from the disk. cold: bytes/s at which images come from the disk, or None if it was not measured.
    """

    train: int
    val: int
    image_bytes: float = 0.0
    stays_in_memory: bool = True
    cold: float | None = None


IMAGENET = Data(train=1_281_167, val=50_000)  # ILSVRC-2012, for a forecast without a dataset


def measure_data(dataset: Dataset) -> Data:
    """Return what a forecast needs to know, and read from the disk for some seconds if the shards are local.

    Raises DatasetError or OSError if a shard is missing, changed or unreadable.
    """
    train, val = dataset.reader("train"), dataset.reader("val")
    stays = train.is_kept_in_memory or train.fits_in_page_cache
    cold = None if dataset.storage else read_cold(train)
    return Data(len(train), len(val), float(train.rows["size"].mean()), stays, cold)


def describe(settings: Settings, dataset: Dataset, data: Data) -> Iterator[Finding]:
    """Describe the dataset, and whether it fits into memory, the cache and the limit on open files.

    Raises DatasetError if the cache is too small for it.
    """
    manifest, reader = dataset.manifest, dataset.reader("train")
    shards = [*reader.shards, *dataset.reader("val").shards]
    total = sum(shard.bytes for _, shard in shards)
    yield Finding(
        "dataset",
        f"{redact(str(settings.data))}: {data.train:,} training and {data.val:,} validation images in "
        f"{len(manifest.classes):,} classes; shorter side {manifest.size} px; {size(total)} in "
        f"{len(shards):,} shards",
    )
    reader.check_window(settings.shuffle_window, rank=0, world=1)  # several processes here share the room
    if dataset.storage is not None:
        cache = dataset.storage.cache
        text = f"{cache.folder} may grow to {size(cache.size)}"
        if cache.size < total:
            remedy = f"use --cache-size {size(total).replace(' ', '')} or more, if the disk has room"
            yield Finding("cache", f"{text}, so shards are fetched again in each epoch", "note", remedy)
        else:
            yield Finding("cache", f"{text}, so each shard is fetched once")
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < len(shards) + _OTHER_FILES:
        yield Finding(
            "open files",
            f"at most {hard:,}, and all {len(shards):,} shards stay open",
            "problem",
            f"raise the limit to {len(shards) + 1024}: ulimit -Hn, or docker run --ulimit nofile=…",
        )
    if reader.is_kept_in_memory:
        when = "only in the first epoch, and later all images are in memory"
    elif reader.fits_in_page_cache:
        when = "only in the first epoch, and later all shards should be in the page cache"
    else:
        when = (
            f"in each epoch, because {size(machine.memory_bytes())} of memory are too little for the shards"
        )
    yield Finding("disk", f"delivers {size(data.cold or 0)}/s of images in random order; read {when}")


def read_cold(reader: ShardReader, seconds: float = _COLD_SECONDS) -> float:
    """Return the bytes/s at which a reader gets samples in random order from the disk.

    They are read in batches, as in training, after their shards were dropped from the page cache. Where that
    has no effect, as in a file system in memory, the figure is that of memory.
    """
    for path, _ in reader.shards:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(0).permutation(len(reader))
    batches = np.array_split(order, max(1, len(order) // _BATCH))
    begun, count = time.monotonic(), 0
    reader.prefetch(batches[0])
    for batch, following in zip(batches, [*batches[1:], batches[0][:0]], strict=True):
        reader.prefetch(following)
        count += sum(map(len, reader.read(batch).jpegs))
        if time.monotonic() - begun > seconds or count > _COLD_BYTES:
            break
    return count / (time.monotonic() - begun)


def run_folder(settings: Settings, has_data: bool) -> Iterator[Finding]:
    """Describe the run folder and its disk. has_data: whether there is a dataset to compare the run with.

    Raises SettingsError or RunError if the folder holds something else than this run, or if another process
    is training it.
    """
    run, disk = Run(settings.run_folder), existing(settings.run_folder)
    if not os.access(disk, os.W_OK | os.X_OK):
        remedy = "choose another --out; in a container, mount a folder that belongs to its user on /runs"
        yield Finding("run folder", f"{disk} cannot be written", "problem", remedy)
        return
    continues = run.begun and (not has_data or not run.check_is_new(settings, read_data(settings.data)))
    run.check_is_idle()
    what = "holds a run, which would be continued" if continues else "is free"
    yield Finding("run folder", f"{run.folder} {what}; {size(shutil.disk_usage(disk).free)} of disk are free")


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest folder above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def space(settings: Settings, checkpoint_bytes: int) -> Iterator[Finding]:
    """Compare the free space with what the checkpoints of a run take, which has the size of one of them."""
    folder = settings.run_folder
    held = sum(path.stat().st_size for path in (folder / "checkpoints").glob("*.pt"))
    # The newest ones, the best one, and the next one while it is written.
    needed = (settings.keep_checkpoints + 2) * checkpoint_bytes
    free = shutil.disk_usage(existing(folder)).free
    text = f"{settings.keep_checkpoints} and the best one, of {size(checkpoint_bytes)} each"
    if needed <= free + held:
        yield Finding("checkpoints", text)
        return
    few = settings.keep_checkpoints > 1 and 3 * checkpoint_bytes <= free + held
    remedy = "use --keep-checkpoints 1" if few else "free the disk, or choose another one with --out"
    yield Finding("checkpoints", f"{text}, do not fit into {size(free)}", "problem", remedy)


def ports(settings: Settings, processes: int) -> Iterator[Finding]:
    """Describe the ports of the metrics servers. Raises SettingsError if one is in use."""
    check_ports(settings, processes)
    if settings.port == 0:
        yield Finding("port", "none: --port 0")
    else:
        last = settings.port + processes - 1
        yield Finding("port", f"{settings.port}{f' to {last}' if processes > 1 else ''}: free")
