"""Pack folders of images into WebDataset shards with an index and a manifest.

    python tools/make_shards.py --input ILSVRC2012 --output shards

The input is ImageNet's own layout, train/<class>/… and val/<class>/…, or one folder of class
folders together with --val-fraction. Files are judged by content; those that cannot be used are
counted by reason, listed in report.tsv, and never stop the run.

Which file lands where depends on the sorted file names and the seed alone, and each shard is packed
by itself: a rerun gives the same bytes, with any number of workers.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
import PIL

from pipeline.manifest import (
    NAME,
    Class,
    DatasetError,
    Manifest,
    Split,
    read_manifest,
    write_manifest,
)
from pipeline.shards import write_index
from tools.images import RESAMPLING, SUBSAMPLING, Geometry
from tools.packing import Result, Task, run_tasks
from tools.pixel_sums import PixelSums
from tools.sources import SourceError, Sources, find_sources, read_class_names

REPORT = "report.tsv"
_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # file names may hold them


def plan_tasks(options: argparse.Namespace, sources: Sources) -> dict[str, list[Task]]:
    """The shards of each split: its files in a seeded order, in equal parts."""
    tasks: dict[str, list[Task]] = {}
    for number, (split, files) in enumerate(sources.splits.items()):
        order = np.random.default_rng((options.seed, 2, number)).permutation(len(files))
        parts = np.array_split(order, -(-len(files) // options.shard_samples))
        firsts = np.cumsum([0, *map(len, parts)])
        tasks[split] = [
            Task(
                input=options.input,
                path=options.output / f"{split}-{shard:06d}.tar",
                first_key=int(first),
                sources=tuple(files[i] for i in part),
                measured=split == "train",
                geometry=options.geometry,
                size=options.size,
                quality=options.quality,
            )
            for shard, (first, part) in enumerate(zip(firsts, parts, strict=False))
        ]
    return tasks


def write_split(output: Path, split: str, results: list[Result]) -> Split:
    """Write the index of a split. Raises SourceError if nothing of it could be used."""
    shards = [result.shard for result in results if result.shard is not None]
    if not shards:
        raise SourceError(
            f"none of the files for the split '{split}' can be used: {output / REPORT} says why"
        )
    parts = [result.rows for result in results if result.shard is not None]
    for number, rows in enumerate(parts):
        rows["shard"] = number
    rows, name = np.concatenate(parts), f"{split}.index.npy"
    return Split(
        samples=len(rows), index=name, index_sha256=write_index(output / name, rows), shards=tuple(shards)
    )


def write_report(output: Path, sources: Sources, results: list[Result]) -> dict[str, dict[str, int]]:
    """List what was repaired and rejected; returns the counts by outcome and reason."""
    events = [(path, "rejected", "not in a class folder") for path in sources.strays]
    events += [event for result in results for event in result.events]
    rows = (("file", "outcome", "reason"), *sorted(events))
    text = "".join("\t".join(column.translate(_ESCAPES) for column in row) + "\n" for row in rows)
    (output / REPORT).write_text(text, encoding="utf-8", errors="surrogateescape")
    counts = Counter(event[1:] for event in events)
    return {
        outcome: {reason: n for (kind, reason), n in sorted(counts.items()) if kind == outcome}
        for outcome in ("repaired", "rejected")
    }


def prepare_output(output: Path, overwrite: bool) -> None:
    """Make the folder. Raises SourceError if it holds a dataset that is not to be replaced."""
    if (output / NAME).exists():
        if not overwrite:
            raise SourceError(
                f"{output} already holds a dataset: choose another --output, or replace it with --overwrite"
            )
        try:
            splits = read_manifest(output).splits
        except DatasetError:
            splits = {}  # broken: what it named is overwritten or left
        (output / NAME).unlink()
        for split in splits.values():
            for path in (output / split.index, *(output / shard.file for shard in split.shards)):
                path.unlink(missing_ok=True)
                path.with_suffix(".idx").unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def pack(options: argparse.Namespace) -> Manifest:
    """Pack the whole dataset. Raises SourceError, DatasetError, OSError or BrokenProcessPool."""
    sources = find_sources(options.input, options.val_fraction, options.seed)
    names = read_class_names(options.class_names)
    inside = options.output.resolve().is_relative_to(options.input.resolve())
    if inside and options.val_fraction is not None:
        raise SourceError(f"--output {options.output} is inside --input, where it would be taken for a class")
    prepare_output(options.output, options.overwrite)
    tasks = plan_tasks(options, sources)
    results = run_tasks([task for split in tasks.values() for task in split], options.workers)
    counts = write_report(options.output, sources, results)
    sums, splits, rest = PixelSums(), {}, iter(results)
    for split, planned in tasks.items():
        part = [next(rest) for _ in planned]
        splits[split] = write_split(options.output, split, part)
        for result in part:
            sums.add(result.sums)
    rows = np.concatenate([result.rows for result in results])
    manifest = Manifest(
        format=1,
        geometry=options.geometry,
        size=options.size,
        max_width=rows["width"].max(),
        max_height=rows["height"].max(),
        classes=tuple(Class(id=name, name=names.get(name, name)) for name in sources.classes),
        splits=splits,
        pixels=sums.statistics(),
        packed={
            "by": f"alexnet-train {version('alexnet-train')}",
            "pillow": PIL.__version__,
            "quality": options.quality,
            "subsampling": SUBSAMPLING,
            "resampling": RESAMPLING.name.lower(),
            "seed": options.seed,
            "shard_samples": options.shard_samples,
        },
        **counts,
    )
    write_manifest(options.output, manifest)
    return manifest


def summary(manifest: Manifest, options: argparse.Namespace, seconds: float) -> str:
    """What was packed, for people."""
    total = sum(split.samples for split in manifest.splits.values())
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    lines = [
        f"{total:,} images ({parts}) of {len(manifest.classes):,} classes, {size / 1e6:,.1f} MB, "
        f"in {seconds:.1f} s ({total / seconds:,.0f} images/s)"
    ]
    for outcome, counts in (("repaired", manifest.repaired), ("rejected", manifest.rejected)):
        if counts:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
            lines.append(f"{outcome}: {reasons}; each is listed in {options.output / REPORT}")
    lines.append(f"train on them: alexnet-train --data {options.output}")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def integer(low: int, high: int):
        def whole_number(text: str) -> int:
            if not low <= int(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
            return int(text)

        return whole_number

    def fraction(text: str) -> float:
        if not 0 < float(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
        return float(text)

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="images: train/<class>/…, val/<class>/…")
    add("--output", type=Path, required=True, metavar="DIR", help="where the shards go")
    add("--geometry", choices=get_args(Geometry), default="256",
        help="256: shorter side to 256 px and its central square, as in the paper; short256: not cut; "
        "original: the files' own bytes where they are sound")  # fmt: skip
    add(
        "--size",
        type=integer(16, 4096),
        default=256,
        metavar="PX",
        help="of the shorter side (default 256)",
    )
    add("--quality", type=integer(1, 100), default=90, help="of the JPEGs (default 90)")
    add(
        "--val-fraction",
        type=fraction,
        metavar="F",
        help="of each class, kept for validation, if DIR has no val",
    )
    add("--class-names", type=Path, metavar="FILE", help="lines of a class folder's name and a name to show")
    add(
        "--shard-samples",
        type=integer(1, 10**6),
        default=1000,
        metavar="N",
        help="images in a shard at most (default 1000)",
    )
    add("--seed", type=integer(0, 2**63), default=0, help="of the order of images (default 0)")
    add(
        "--workers",
        type=integer(1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )
    add("--overwrite", action="store_true", help="replace the dataset that --output holds")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    start = time.monotonic()
    try:
        manifest = pack(options)
    except BrokenProcessPool:
        sys.exit(
            "make_shards: a worker process died, perhaps for want of memory: try again with fewer --workers"
        )
    except (SourceError, DatasetError) as error:
        sys.exit(f"make_shards: {error}")
    except OSError as error:
        sys.exit(
            f"make_shards: {error.strerror}: {error.filename or options.output}. The folder is no dataset "
            f"until {NAME} is written: mend the cause and run again"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    print(summary(manifest, options, time.monotonic() - start))


if __name__ == "__main__":
    main()
