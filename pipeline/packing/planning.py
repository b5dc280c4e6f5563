"""Divide the images that were found into the tasks that pack them."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np

from pipeline.packing.images import RESAMPLING, SUBSAMPLING
from pipeline.packing.options import PackingOptions
from pipeline.packing.resume import Plan
from pipeline.packing.shard import ImageOptions, ShardTask, versions
from pipeline.packing.sources.find import SourceError, SourceImage, Sources
from pipeline.packing.storage import absolute


def plan_tasks(options: PackingOptions, sources: Sources) -> dict[str, list[ShardTask]]:
    """Return a task for each shard of each split.

    Raises SourceError for files that are not in tars if the tars are to be indexed in place.
    """
    image_options = ImageOptions(options.geometry, options.size, options.quality, options.check, versions())
    parts = _tars if options.in_place else _shards
    return {
        split: [
            ShardTask(
                output=absolute(options.output),
                name=f"{split}-{number:06d}.tar",
                first_key=first,
                sources=tuple(part),
                in_statistics=split == "train",
                image_options=image_options,
                tar=tar,
                table=sources.table,
            )
            for number, (first, part, tar) in enumerate(parts(options, files, split_index))
        ]
        for split_index, (split, files) in enumerate(sources.splits.items())
    }


Parts = Iterator[tuple[int, list[SourceImage], str | None]]  # first key, files, and the tar that holds them


def _shards(options: PackingOptions, files: Sequence[SourceImage], split: int) -> Parts:
    """Shuffle the files by the seed, and divide them into equal parts."""
    order = np.random.default_rng((options.seed, 2, split)).permutation(len(files))
    first = 0
    for part in np.array_split(order, -(-len(files) // options.shard_samples)):
        yield first, [files[i] for i in part], None
        first += len(part)


def _tars(options: PackingOptions, files: Sequence[SourceImage], split: int) -> Parts:
    """Yield each tar, by its name in the output, with its images in the order of their offsets."""
    tars: dict[str, list[SourceImage]] = {}
    for source in files:
        if source.size is None:
            raise SourceError(f"--in-place needs images in tars, but {source.file} is a separate file")
        tars.setdefault(os.path.relpath(source.file, options.output), []).append(source)
    for tar in sorted(tars):
        yield 0, sorted(tars[tar], key=lambda source: source.offset), tar


def describe_plan(options: PackingOptions, tasks: Sequence[ShardTask]) -> Plan:
    """Return everything that the shards depend on, under names that users know."""
    files = sha256()
    for task in tasks:
        files.update(f"{task.name} {task.first_key} {task.sources}\n".encode())
    return {
        "--input": absolute(options.input),
        "--in-place": options.in_place,
        "--geometry": options.geometry,
        "--size": options.size,
        "--quality": options.quality,
        "--check": options.check,
        "--val-fraction": options.val_fraction,
        "--shard-samples": options.shard_samples,
        "--seed": options.seed,
        "the files found": files.hexdigest(),
        "the packer": {"subsampling": SUBSAMPLING, "resampling": RESAMPLING.name.lower(), **versions()},
    }
