"""Pack images into WebDataset shards with an index and a manifest.

    alexnet-train make-shards --input ILSVRC2012 --out shards

The input is ImageNet's own layout, train/<class>/… and val/<class>/…, or another that folders.py and
tables.py name. Files are judged by content; those that cannot be used are counted by reason, listed
in report.tsv, and never stop the run.

Which file lands where depends on the sorted file names and the seed alone, and each shard is packed
by itself: a rerun gives the same bytes, with any number of workers. The same command continues a run
that was killed.
"""

import argparse
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import get_args

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.machine import cpus
from pipeline.manifest import NAME, DatasetError, Manifest
from pipeline.packing.images import Geometry
from pipeline.packing.options import PackingOptions
from pipeline.packing.pack import pack
from pipeline.packing.progress import Progress
from pipeline.packing.resume import REPORT
from pipeline.packing.shard import DECODED, Check, PackingError
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import Folder, is_url
from pipeline.packing.workers import WorkersError, end_at_sigterm, refused_threads
from tools.options import fraction, refuse_old_name, within


def summary(manifest: Manifest, output: str, progress: Progress, seconds: float) -> str:
    """What was packed, for people."""
    total = sum(split.samples for split in manifest.splits.values())
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    lines = [
        f"{total:,} images ({parts}) of {len(manifest.classes):,} classes, {size / 1e6:,.1f} MB, "
        f"in {seconds:.1f} s ({progress.counts.images / seconds:,.0f} images/s)"
    ]
    if progress.before:
        lines[0] += f"; {progress.before:,} were packed before"
    for outcome, counts in (("repaired", manifest.repaired), ("rejected", manifest.rejected)):
        if counts:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
            lines.append(f"{outcome}: {reasons}; each is listed in {output}/{REPORT}")
    lines.append(f"train on them: alexnet-train --data {output}")
    return "\n".join(lines)


def check_rejects(manifest: Manifest, limit: float) -> None:
    """Raises DatasetError if more than that share of the files was rejected."""
    rejected = sum(manifest.rejected.values())
    found = rejected + sum(split.samples for split in manifest.splits.values())
    if rejected > limit * found:
        raise DatasetError(
            f"{rejected:,} of {found:,} files were rejected ({rejected / found:.1%}), more than "
            f"--max-reject-ratio {limit:g}. The dataset is whole without them"
        )


# fmt: off
def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="FOLDER",
        help="class folders train/<class>/… and val/<class>/…, ILSVRC's tars, Kaggle's download, "
        "WebDataset shards, or a table (CSV, TSV, Parquet); here or behind a URL")
    add("--out", dest="output", metavar="DIR", help="where the shards go, here or behind a URL")
    refuse_old_name(parser, "--output", "--out")
    add("--in-place", action="store_true",
        help="write no shards, but index the WebDataset shards of --input; what is no plain JPEG is left out")
    add("--geometry", choices=get_args(Geometry), default="256",
        help="256: shorter side to 256 px and its central square, as in the paper; short256: not cut; "
        "original: the files' own bytes, without metadata, where they are sound")
    add("--size", type=within(int, 16, 4096), default=256, metavar="PX",
        help="of the shorter side (default 256)")
    add("--quality", type=within(int, 1, 100), default=90, help="of the JPEGs (default 90)")
    add("--check", choices=get_args(Check), default="decode",
        help="of files that are kept as they are: decode all, or believe headers and decode one in "
        f"{DECODED}, for mean and components (default decode)")
    add("--val-fraction", type=fraction, metavar="F",
        help="of each class, kept for validation, if DIR has no val")
    add("--class-names", type=Path, metavar="FILE",
        help="lines of a class folder's name and a name to show")
    add("--shard-samples", type=within(int, 1, 10**6), default=1000, metavar="N",
        help="images in a shard at most (default 1000)")
    add("--seed", type=within(int, 0, 2**63), default=0, help="of the order of images (default 0)")
    add("--max-reject-ratio", type=within(float, 0, 1), default=0.01, metavar="R",
        help="exit with 1, the dataset kept, if more of the files are rejected (default 0.01)")
    add("--workers", type=within(int, 1, 1024), default=cpus(),
        help="processes (default: one a CPU)")
    add("--executor", choices=("processes", "dask"), default="processes",
        help="who packs: processes of this machine, or the workers of a Dask cluster")
    add("--scheduler", metavar="ADDRESS", help="of the Dask cluster, such as tcp://host:8786")
    add("--metrics-port", type=within(int, 1, 65535), metavar="PORT", help="serve Prometheus metrics there")
    add("--overwrite", action="store_true",
        help="replace the dataset that --out holds, whole or unfinished")
    options = parser.parse_args(arguments)
    if (options.executor == "dask") != (options.scheduler is not None):
        parser.error("--executor dask and --scheduler ADDRESS go together")
    if options.in_place == (options.output is not None):
        parser.error("one of --out DIR and --in-place is needed")
    if options.in_place:
        for name in ("geometry", "quality", "val_fraction", "shard_samples", "seed"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for writing shards, and --in-place writes none")
        if is_url(options.input):
            parser.error("--in-place is for a folder of this machine")
        options.output = options.input
    elif options.check == "headers" and options.geometry != "original":
        parser.error("--check headers is for --geometry original and --in-place, which keep files")
    given = {field.name: getattr(options, field.name) for field in fields(PackingOptions)}
    options.packing = PackingOptions(**given)
    return options
# fmt: on


def main() -> None:
    options = parse_arguments()
    end_at_sigterm()
    start, progress = time.monotonic(), Progress()
    try:
        with refused_threads(), _metrics(progress, options.metrics_port):
            manifest = pack(options.packing, progress)
        print(summary(manifest, options.output, progress, time.monotonic() - start))
        check_rejects(manifest, options.max_reject_ratio)
    except (SourceError, DatasetError, PackingError, WorkersError) as error:
        sys.exit(f"make_shards: {error}")
    except OSError as error:
        sys.exit(f"make_shards: {_advice(error, options.output)}")
    except KeyboardInterrupt:
        sys.exit(130)


def _advice(error: OSError, output: str) -> str:
    """What went wrong, and what is to be done."""
    reason = f"{error.strerror}: {error.filename or output}" if error.strerror else str(error)
    with suppress(OSError):
        if NAME not in Folder(output).sizes():
            reason += f". The folder is no dataset until {NAME} is written"
    return f"{reason}: mend the cause and give the same command, which continues"


def _metrics(progress: Progress, port: int | None):
    if port is None:
        return nullcontext()
    from pipeline.packing.exporter import serve

    return serve(progress, port)


if __name__ == "__main__":
    main()
