"""Pack images into WebDataset shards with an index and a manifest.

    python tools/make_shards.py --input ILSVRC2012 --output shards

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import get_args

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.machine import cpus
from pipeline.manifest import NAME, DatasetError, Manifest
from tools.inputs.sources import SourceError, find_sources
from tools.packing import executors, journal
from tools.packing.dataset import describe_plan, plan_tasks, write_dataset
from tools.packing.images import Geometry
from tools.packing.journal import REPORT
from tools.packing.progress import Progress
from tools.packing.results import Result, load_result
from tools.packing.shard import DECODED, Check, PackingError, Task
from tools.storage import UNFINISHED, Folder, absolute, is_url
from tools.workers import WorkersError, end_at_sigterm, refused_threads, say


def pack(options: argparse.Namespace, progress: Progress | None = None) -> Manifest:
    """Pack the whole dataset. Raises SourceError, DatasetError, PackingError or OSError."""
    _check_folders(options)
    sources = find_sources(absolute(options.input), options.val_fraction, options.seed, options.class_names)
    tasks = plan_tasks(options, sources)
    every = [task for split in tasks.values() for task in split]
    output = Folder(options.output)
    with journal.locked(output):
        if journal.begin(output, describe_plan(options, every), options.overwrite, options.in_place):
            manifest = Manifest.model_validate_json(output.read(NAME))
        else:
            results = _results(options, every, output, progress or Progress())
            manifest = write_dataset(options, sources, tasks, results)
        try:
            journal.end(output)
        except OSError as error:
            left = error.filename or f"{output}/{UNFINISHED}"
            say(f"the dataset is whole, but {left} cannot be removed: {error.strerror}")
    return manifest


def _check_folders(options: argparse.Namespace) -> None:
    if options.val_fraction is None or is_url(options.input) or is_url(options.output):
        return
    if Path(options.output).resolve().is_relative_to(Path(options.input).resolve()):
        raise SourceError(f"--output {options.output} is inside --input, where it would be taken for a class")


def _results(
    options: argparse.Namespace, tasks: list[Task], output: Folder, progress: Progress
) -> list[Result]:
    """Of all tasks, those that an earlier run finished among them."""
    sizes = output.sizes()
    sizes |= {task.tar: Path(options.output, task.tar).stat().st_size for task in tasks if task.tar}
    with ThreadPoolExecutor(16) as pool:  # behind a URL, each record is a request or two
        results = list(pool.map(lambda task: load_result(output, task.name, task.files, sizes), tasks))
    missing = [task for task, result in zip(tasks, results, strict=True) if result is None]
    total, left = (sum(len(task.sources) for task in some) for some in (tasks, missing))
    progress.begin(total, total - left)
    if missing:
        crew = (
            executors.processes(min(options.workers, len(missing)))
            if options.executor == "processes"
            else executors.dask(options.scheduler)
        )
        with progress, crew as workers:
            packed = iter(executors.run_tasks(missing, workers, progress.show))
        results = [next(packed) if result is None else result for result in results]
    return [result for result in results if result is not None]


def summary(manifest: Manifest, options: argparse.Namespace, progress: Progress, seconds: float) -> str:
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
            lines.append(f"{outcome}: {reasons}; each is listed in {options.output}/{REPORT}")
    lines.append(f"train on them: alexnet-train --data {options.output}")
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


def _number(kind: type, low: float, high: float):
    def number(text: str):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def _fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


# fmt: off
def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="FOLDER",
        help="class folders train/<class>/… and val/<class>/…, ILSVRC's tars, Kaggle's download, "
        "WebDataset shards, or a table (CSV, TSV, Parquet); here or behind a URL")
    add("--output", metavar="DIR", help="where the shards go, here or behind a URL")
    add("--in-place", action="store_true",
        help="write no shards, but index the WebDataset shards of --input; what is no plain JPEG is left out")
    add("--geometry", choices=get_args(Geometry), default="256",
        help="256: shorter side to 256 px and its central square, as in the paper; short256: not cut; "
        "original: the files' own bytes, without metadata, where they are sound")
    add("--size", type=_number(int, 16, 4096), default=256, metavar="PX",
        help="of the shorter side (default 256)")
    add("--quality", type=_number(int, 1, 100), default=90, help="of the JPEGs (default 90)")
    add("--check", choices=get_args(Check), default="decode",
        help="of files that are kept as they are: decode all, or believe headers and decode one in "
        f"{DECODED}, for mean and components (default decode)")
    add("--val-fraction", type=_fraction, metavar="F",
        help="of each class, kept for validation, if DIR has no val")
    add("--class-names", type=Path, metavar="FILE",
        help="lines of a class folder's name and a name to show")
    add("--shard-samples", type=_number(int, 1, 10**6), default=1000, metavar="N",
        help="images in a shard at most (default 1000)")
    add("--seed", type=_number(int, 0, 2**63), default=0, help="of the order of images (default 0)")
    add("--max-reject-ratio", type=_number(float, 0, 1), default=0.01, metavar="R",
        help="exit with 1, the dataset kept, if more of the files are rejected (default 0.01)")
    add("--workers", type=_number(int, 1, 1024), default=cpus(),
        help="processes (default: one a CPU)")
    add("--executor", choices=("processes", "dask"), default="processes",
        help="who packs: processes of this machine, or the workers of a Dask cluster")
    add("--scheduler", metavar="ADDRESS", help="of the Dask cluster, such as tcp://host:8786")
    add("--metrics-port", type=_number(int, 1, 65535), metavar="PORT", help="serve Prometheus metrics there")
    add("--overwrite", action="store_true",
        help="replace the dataset that --output holds, whole or unfinished")
    options = parser.parse_args(arguments)
    if (options.executor == "dask") != (options.scheduler is not None):
        parser.error("--executor dask and --scheduler ADDRESS go together")
    if options.in_place == (options.output is not None):
        parser.error("one of --output DIR and --in-place is needed")
    if options.in_place:
        for name in ("geometry", "quality", "val_fraction", "shard_samples", "seed"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for writing shards, and --in-place writes none")
        if is_url(options.input):
            parser.error("--in-place is for a folder of this machine")
        options.output = options.input
    elif options.check == "headers" and options.geometry != "original":
        parser.error("--check headers is for --geometry original and --in-place, which keep files")
    return options
# fmt: on


def main() -> None:
    options = parse_arguments()
    end_at_sigterm()
    start, progress = time.monotonic(), Progress()
    try:
        with refused_threads(), _metrics(progress, options.metrics_port):
            manifest = pack(options, progress)
        print(summary(manifest, options, progress, time.monotonic() - start))
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
    from tools.packing.metrics import serve

    return serve(progress, port)


if __name__ == "__main__":
    main()
