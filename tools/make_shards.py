"""Pack images into WebDataset shards with an index and a manifest.

    alexnet-train make-shards --input ILSVRC2012 --out shards

The input has ImageNet's own layout, train/<class>/… and val/<class>/…, or one of the other forms that
folders.py and tables.py in pipeline/packing/sources describe. Files are judged by their content. Those
that cannot be used are counted by reason and listed in report.tsv; they never stop the run.

The contents of each shard depend only on the sorted file names and the seed, and each shard is packed
independently, so a rerun gives the same bytes with any number of workers. If a run is killed, the same
command continues it.
"""

import argparse
import shlex
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.locations import is_url
from pipeline.machine import cpus
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest
from pipeline.output import secure
from pipeline.packing.images import Geometry
from pipeline.packing.options import PackingOptions
from pipeline.packing.pack import pack
from pipeline.packing.progress import Progress
from pipeline.packing.resume import REPORT
from pipeline.packing.shard import DECODE_EVERY, Check, PackingError
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import Folder
from pipeline.packing.workers import WorkersError, exit_on_signals, translate_thread_errors
from pipeline.remote_errors import redact
from tools.options import fraction, within


def summary(manifest: Manifest, output: str, progress: Progress, seconds: float) -> str:
    """Describe what was packed, for the terminal."""
    total = sum(split.samples for split in manifest.splits.values())
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    lines = [
        f"{total:,} images ({parts}) of {len(manifest.classes):,} classes, {size / 1e6:,.1f} MB, "
        f"in {seconds:.1f} s ({progress.counts.images / seconds:,.0f} images/s)"
    ]
    if progress.before:
        lines[0] += f"; {progress.before:,} were packed by earlier runs"
    for outcome, counts in (("repaired", manifest.repaired), ("rejected", manifest.rejected)):
        if counts:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
            lines.append(f"{outcome}: {reasons}; each is listed in {redact(output)}/{REPORT}")
    lines += progress.remarks.notes
    lines.append(f"train on them: alexnet-train --data {shlex.quote(redact(output))}")
    return "\n".join(lines)


def check_rejects(manifest: Manifest, limit: float) -> None:
    """Raise DatasetError if the fraction of rejected files exceeds `limit`."""
    rejected = sum(manifest.rejected.values())
    found = rejected + sum(split.samples for split in manifest.splits.values())
    if rejected > limit * found:
        raise DatasetError(
            f"{rejected:,} of {found:,} files were rejected ({rejected / found:.1%}), more than "
            f"--max-reject-ratio {limit:g} allows. The dataset is complete without them"
        )


# fmt: off
def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH",
        help="the images: class folders train/<class>/… and val/<class>/…, the ILSVRC tars, Kaggle's "
        "download, WebDataset shards, Hugging Face's Parquet files, or a table (CSV, TSV or Parquet); a "
        "local path or a URL")
    add("--out", dest="output", metavar="DIR", help="local folder or URL to write the shards to")
    add("--in-place", action="store_true",
        help="write no shards, but index the WebDataset shards of --input where they are; images that are "
        "not plain JPEGs are skipped")
    add("--geometry", choices=get_args(Geometry),
        help="256: resize the shorter side to 256 px and crop the central square, as in the paper; short256: "
        "resize without cropping; original: keep the bytes of intact files, without their metadata "
        "(default %(default)s)")
    add("--size", type=within(int, 16, 4096), metavar="PX",
        help="length of the shorter side after resizing, in pixels (default %(default)s)")
    add("--quality", type=within(int, 1, 100), help="JPEG quality, from 1 to 100 (default %(default)s)")
    add("--check", choices=get_args(Check),
        help="how to check files that are kept unchanged: decode every file, or trust the headers and decode "
        f"only one file in {DECODE_EVERY}, to compute the pixel mean and principal components "
        "(default %(default)s)")
    add("--val-fraction", type=fraction, metavar="F",
        help="fraction of each class to hold out for validation if --input has no validation images")
    add("--class-names", type=Path, metavar="FILE",
        help="text or CSV file that has, on each line, a class folder's name and the name to show for it")
    add("--shard-samples", type=within(int, 1, 10**6), metavar="N",
        help="maximum number of images in a shard (default %(default)s)")
    add("--seed", type=within(int, 0, 2**63),
        help="random seed for the order of the images and for --val-fraction (default %(default)s)")
    add("--max-reject-ratio", type=within(float, 0, 1), default=0.01, metavar="R",
        help="exit with code 1 if a larger fraction of the files is rejected; the dataset is kept "
        "(default 0.01)")
    add("--workers", type=within(int, 1, 1024), default=cpus(),
        help="number of worker processes (default: one per CPU)")
    add("--executor", choices=("processes", "dask"), default="processes",
        help="where to pack: in processes on this machine, or on the workers of a Dask cluster "
        "(default processes)")
    add("--scheduler", metavar="ADDRESS", help="address of the Dask scheduler, such as tcp://host:8786")
    add("--metrics-port", type=within(int, 1, 65535), metavar="PORT",
        help="serve Prometheus metrics on this port while packing")
    add("--metrics-address", default="0.0.0.0", metavar="ADDRESS",
        help="address that the metrics server binds to (default %(default)s)")
    add("--overwrite", action="store_true",
        help="replace the dataset in --out, whether it is complete or unfinished")
    settings = fields(PackingOptions)
    parser.set_defaults(**{field.name: field.default for field in settings if field.default is not MISSING})
    options = parser.parse_args(arguments)
    if (options.executor == "dask") != (options.scheduler is not None):
        parser.error("--executor dask and --scheduler ADDRESS must be given together")
    if options.in_place == (options.output is not None):
        parser.error("give either --out DIR or --in-place")
    if options.in_place:
        for name in ("geometry", "quality", "val_fraction", "shard_samples", "seed"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')} cannot be used with --in-place, which writes no shards"
                )
        if is_url(options.input):
            parser.error("--in-place needs a local folder, and --input is a URL")
        options.output = options.input
    elif options.check == "headers" and options.geometry != "original":
        parser.error("--check headers needs --geometry original or --in-place, which keep files unchanged")
    options.packing = PackingOptions(**{field.name: getattr(options, field.name) for field in settings})
    return options
# fmt: on


def main() -> None:
    secure()
    options = parse_arguments()
    exit_on_signals()
    start, progress = time.monotonic(), Progress()
    try:
        with translate_thread_errors(), _metrics(progress, options):
            manifest = pack(options.packing, progress)
        print(summary(manifest, options.output, progress, time.monotonic() - start))
        for remark in (*progress.remarks.warnings, *progress.remarks.faults):
            progress.say(remark)
        check_rejects(manifest, options.max_reject_ratio)
        if progress.remarks.faults:
            sys.exit(1)
    except (SourceError, DatasetError, PackingError, WorkersError) as error:
        sys.exit(f"make-shards: {error}")
    except OSError as error:
        sys.exit(f"make-shards: {_advice(error, options.output)}")
    except KeyboardInterrupt:
        sys.exit(130)


def _advice(error: OSError, output: str) -> str:
    """Say what went wrong and what to do about it."""
    reason = f"{error.strerror}: {redact(error.filename or output)}" if error.strerror else str(error)
    with suppress(OSError):
        if MANIFEST_NAME not in Folder(output).sizes():
            reason += f". The dataset is incomplete until {MANIFEST_NAME} is written"
    return f"{reason}: fix the cause and run the same command again to continue"


def _metrics(progress: Progress, options: argparse.Namespace):
    if options.metrics_port is None:
        return nullcontext()
    from pipeline.packing.exporter import serve

    return serve(progress, options.metrics_port, options.metrics_address)


if __name__ == "__main__":
    main()
