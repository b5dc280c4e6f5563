"""Divide the images that were found into tasks, each of which packs one shard."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np

from pipeline.packing.images import RESAMPLING, SUBSAMPLING
from pipeline.packing.options import PackingOptions
from pipeline.packing.resume import Plan
from pipeline.packing.shard import ImageOptions, ShardTask, versions
from pipeline.packing.sources.find import SourceError, SourceImage, Sources
from pipeline.remote_errors import redact
from pipeline.storage import absolute


def plan_tasks(options: PackingOptions, sources: Sources) -> dict[str, list[ShardTask]]:
    """Return the tasks of each split, one for each shard.

    Raises SourceError if tars are to be indexed in place, and an image is not in a tar.
    """
    if options.in_place and sources.sequential:
        raise SourceError(
            f"--in-place needs plain tars, but {min(sources.sequential)} must be extracted first"
        )
    image_options = ImageOptions(options.geometry, options.size, options.quality, options.check, versions())
    divide = _by_tar if options.in_place else _by_shard
    return {
        split: [
            ShardTask(
                output=absolute(options.output),
                name=f"{split}-{number:06d}.tar",
                first_key=first,
                sources=tuple(images),
                in_statistics=split == "train",
                image_options=image_options,
                tar=tar,
                table=sources.table,
            )
            for number, (first, images, tar) in enumerate(divide(options, files, split_index))
        ]
        for split_index, (split, files) in enumerate(sources.splits.items())
    }


Shards = Iterator[tuple[int, list[SourceImage], str | None]]  # first key, images, and the tar that holds them


def _by_shard(options: PackingOptions, files: Sequence[SourceImage], split: int) -> Shards:
    """Shuffle the files by the seed, and divide them equally among the shards."""
    order = np.random.default_rng((options.seed, 2, split)).permutation(len(files))
    first = 0
    for indices in np.array_split(order, -(-len(files) // options.shard_samples)):
        yield first, [files[index] for index in indices], None
        first += len(indices)


def _by_tar(options: PackingOptions, files: Sequence[SourceImage], split: int) -> Shards:
    """Group the files by tar, in the order of their offsets. A tar is named relative to the output."""
    tars: dict[str, list[SourceImage]] = {}
    for source in files:
        if source.size is None:
            raise SourceError(f"--in-place needs images in tars, but {source.file} is a separate file")
        tar = os.path.relpath(source.file, options.output)
        try:
            tar.encode()
        except UnicodeEncodeError:
            raise SourceError(f"--in-place needs tars whose names are UTF-8: rename {tar!a}") from None
        tars.setdefault(tar, []).append(source)
    for tar in sorted(tars):
        yield 0, sorted(tars[tar], key=lambda source: source.offset), tar


def describe_plan(options: PackingOptions, tasks: Sequence[ShardTask]) -> Plan:
    """Return everything that the shards depend on, under the names of the options or in words."""
    files = sha256()
    for task in tasks:
        files.update(f"{task.name} {task.first_key} {task.sources}\n".encode())
    return {
        "--input": redact(absolute(options.input)),
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
