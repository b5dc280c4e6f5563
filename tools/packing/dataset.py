"""From the images found to the tasks that pack them, and from the results to a dataset."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256

import numpy as np
import PIL

from pipeline.files import whole_file
from pipeline.manifest import Class, Manifest, Split, write_manifest
from pipeline.shards import write_index
from tools.inputs.sources import Source, SourceError, Sources
from tools.packing.images import RESAMPLING, SUBSAMPLING, Geometry
from tools.packing.journal import REPORT, Plan
from tools.packing.pixel_sums import PixelSums
from tools.packing.results import Result
from tools.packing.shard import Recipe, Task, versions
from tools.storage import Folder, absolute

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # file names may hold them


def plan_tasks(options: argparse.Namespace, sources: Sources) -> dict[str, list[Task]]:
    """The shards of each split. Raises SourceError for files outside tars, where tars are to be indexed."""
    recipe = Recipe(options.geometry, options.size, options.quality, options.check, versions())
    parts = _tars if options.in_place else _shards
    return {
        split: [
            Task(
                output=absolute(options.output),
                name=f"{split}-{number:06d}.tar",
                first_key=first,
                sources=tuple(part),
                measured=split == "train",
                recipe=recipe,
                tar=tar,
                table=sources.table,
            )
            for number, (first, part, tar) in enumerate(parts(options, files, place))
        ]
        for place, (split, files) in enumerate(sources.splits.items())
    }


Parts = Iterator[tuple[int, list[Source], str | None]]  # first key, files, and the tar that holds them


def _shards(options: argparse.Namespace, files: Sequence[Source], split: int) -> Parts:
    """The files in a seeded order, in equal parts."""
    order = np.random.default_rng((options.seed, 2, split)).permutation(len(files))
    first = 0
    for part in np.array_split(order, -(-len(files) // options.shard_samples)):
        yield first, [files[i] for i in part], None
        first += len(part)


def _tars(options: argparse.Namespace, files: Sequence[Source], split: int) -> Parts:
    """Each tar, by its name in the output, with its images in the order in which they lie there."""
    tars: dict[str, list[Source]] = {}
    for source in files:
        if source.size is None:
            raise SourceError(f"--in-place is for images in tars, and {source.file} is a file by itself")
        tars.setdefault(os.path.relpath(source.file, options.output), []).append(source)
    for tar in sorted(tars):
        yield 0, sorted(tars[tar], key=lambda source: source.offset), tar


def describe_plan(options: argparse.Namespace, tasks: Sequence[Task]) -> Plan:
    """All that the shards depend on, by the name that a user knows it by."""
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


def write_dataset(
    options: argparse.Namespace,
    sources: Sources,
    tasks: Mapping[str, Sequence[Task]],
    results: Sequence[Result],
) -> Manifest:
    """Write report, indices and, last, the manifest. Raises SourceError if no file of a split can be used."""
    output = Folder(options.output)
    counts = write_report(output, sources, results)
    sums, rest = PixelSums(), iter(results)
    parts = {split: [next(rest) for _ in planned] for split, planned in tasks.items()}
    for result in results:
        sums.add(result.sums)
    splits = {split: _write_split(output, split, part) for split, part in parts.items()}
    rows = np.concatenate([result.rows for result in results])
    manifest = Manifest(
        format=1,
        in_place=options.in_place,
        geometry=_geometry(rows, options.size) if options.in_place else options.geometry,
        size=options.size,
        max_width=rows["width"].max(),
        max_height=rows["height"].max(),
        classes=tuple(Class(id=name, name=sources.names.get(name, name)) for name in sources.classes),
        splits=splits,
        pixels=sums.statistics(),
        packed=_packed(options),
        **counts,
    )
    with output.staged() as folder:
        write_manifest(folder, manifest)
    return manifest


def _packed(options: argparse.Namespace) -> dict[str, str | int | float]:
    """How it was made."""
    how = {
        "by": f"alexnet-train {versions()['alexnet-train']}",
        "pillow": PIL.__version__,
        "check": options.check,
    }
    if options.in_place:
        return how
    return how | {
        "quality": options.quality,
        "subsampling": SUBSAMPLING,
        "resampling": RESAMPLING.name.lower(),
        "seed": options.seed,
        "shard_samples": options.shard_samples,
    }


def _geometry(rows: np.ndarray, size: int) -> Geometry:
    """Which one the images have that somebody else has packed."""
    if (np.minimum(rows["width"], rows["height"]) != size).any():
        return "original"
    return "256" if (rows["width"] == rows["height"]).all() else "short256"


def _write_split(output: Folder, split: str, results: Sequence[Result]) -> Split:
    shards = [result.shard for result in results if result.shard is not None]
    if not shards:
        raise SourceError(
            f"none of the files for the split '{split}' can be used: {output}/{REPORT} says why. "
            "When they are mended, give the same command with --overwrite"
        )
    rows, name = np.concatenate([result.rows for result in results]), f"{split}.index.npy"
    rows["shard"] = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    with output.staged() as folder:
        digest = write_index(folder / name, rows)
    return Split(samples=len(rows), index=name, index_sha256=digest, shards=tuple(shards))


def write_report(output: Folder, sources: Sources, results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """List what was repaired and rejected; returns the counts by outcome and reason."""
    events = [(path, "rejected", "in no class") for path in sources.strays]
    events += [event for result in results for event in result.events]
    rows = (("file", "outcome", "reason"), *sorted(events))
    text = "".join("\t".join(column.translate(_ESCAPES) for column in row) + "\n" for row in rows)
    with output.staged() as folder, whole_file(folder / REPORT) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    counts = Counter(event[1:] for event in events)
    return {
        outcome: {reason: n for (kind, reason), n in sorted(counts.items()) if kind == outcome}
        for outcome in ("repaired", "rejected")
    }
