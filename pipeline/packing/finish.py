"""Complete a dataset from the results of all its shards: write the report, the indices and the manifest."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import PIL

from pipeline.files import atomic_write
from pipeline.manifest import Class, Manifest, Split, write_manifest
from pipeline.packing.images import RESAMPLING, SUBSAMPLING, Geometry
from pipeline.packing.options import PackingOptions
from pipeline.packing.resume import REPORT
from pipeline.packing.shard import ShardTask, versions
from pipeline.packing.shard_results import ShardResult
from pipeline.packing.sources.find import SourceError, Sources
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import Folder
from pipeline.shards import write_array

_ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # file names may contain these


def write_dataset(
    options: PackingOptions,
    sources: Sources,
    tasks: Mapping[str, Sequence[ShardTask]],
    results: Sequence[ShardResult],
) -> Manifest:
    """Write the report, the indices and, last, the manifest, which is returned.

    tasks: those of each split. results: of all tasks, in the same order. Raises SourceError if none of a
    split's files can be used, and OSError.
    """
    output = Folder(options.output)
    counts = write_report(output, sources, results)
    sums, remaining = PixelSums(), iter(results)
    by_split = {split: [next(remaining) for _ in planned] for split, planned in tasks.items()}
    for result in results:
        sums.add(result.sums)
    splits = {split: _write_split(output, split, found) for split, found in by_split.items()}
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


def _packed(options: PackingOptions) -> dict[str, str | int | float]:
    """Describe how the dataset was made."""
    description: dict[str, str | int | float] = {
        "by": f"alexnet-train {versions()['alexnet-train']}",
        "pillow": PIL.__version__,
        "check": options.check,
    }
    if options.in_place:
        return description
    return description | {
        "quality": options.quality,
        "subsampling": SUBSAMPLING,
        "resampling": RESAMPLING.name.lower(),
        "seed": options.seed,
        "shard_samples": options.shard_samples,
    }


def _geometry(rows: np.ndarray, size: int) -> Geometry:
    """Determine the geometry of images that were packed by another program."""
    if (np.minimum(rows["width"], rows["height"]) != size).any():
        return "original"
    return "256" if (rows["width"] == rows["height"]).all() else "short256"


def _write_split(output: Folder, split: str, results: Sequence[ShardResult]) -> Split:
    shards = [result.shard for result in results if result.shard is not None]
    if not shards:
        raise SourceError(
            f"none of the files for the split '{split}' can be used: {output}/{REPORT} says why. "
            "Fix them, and run the same command again with --overwrite"
        )
    rows = np.concatenate([result.rows for result in results])
    rows["shard"] = np.repeat(np.arange(len(shards)), [shard.samples for shard in shards])
    index, checksums = f"{split}.index.npy", f"{split}.checksums.npy"
    with output.staged() as folder:
        return Split(
            samples=len(rows),
            index=index,
            index_sha256=write_array(folder / index, rows),
            shards=tuple(shards),
            checksums=checksums,
            checksums_sha256=write_array(
                folder / checksums, np.concatenate([result.checksums for result in results])
            ),
        )


def write_report(
    output: Folder, sources: Sources, results: Sequence[ShardResult]
) -> dict[str, dict[str, int]]:
    """Write the list of repaired and rejected files; return their counts by outcome and reason.

    A folder that could not be listed counts as a rejected file; its path ends in a slash.
    """
    events = [(path, "rejected", "in no class") for path in sources.strays]
    events += [(f"{path}/", "rejected", "unreadable folder") for path in sources.unlisted]
    events += [event for result in results for event in result.events]
    rows = (("file", "outcome", "reason"), *sorted(events))
    text = "".join("\t".join(column.translate(_ESCAPES) for column in row) + "\n" for row in rows)
    with output.staged() as folder, atomic_write(folder / REPORT) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    counts = Counter(event[1:] for event in events)
    return {
        outcome: {reason: n for (kind, reason), n in sorted(counts.items()) if kind == outcome}
        for outcome in ("repaired", "rejected")
    }
