"""Check that a packed dataset is complete and undamaged, down to the byte.

    alexnet-train verify-shards --data shards          # or s3://bucket/shards, or any other URL

Every file named in dataset.json is read. Checksums, the structure of each tar, labels, DALI's .idx files and
the indices are compared with each other, and images are decoded. Each problem is reported with its shard, key
and byte offset. In datasets without checksums of the samples, a sample whose changed pixels still decode
cannot be identified, and only its shard is named. The exit code is 0 if the dataset is sound and 1 if
anything is wrong.

--repair-index rewrites the .idx files, indices and files of checksums that are missing or wrong, using the
tars. If the checksum of a tar differs from the one in dataset.json, nothing is written: copy that shard or
pack it again.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console
from rich.progress import Progress

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import atomic_write
from pipeline.locations import Location, location_of
from pipeline.machine import cpus
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, Split, read_manifest, write_manifest
from pipeline.output import secure
from pipeline.packing.workers import WorkersError, exit_on_signals, pool
from pipeline.remote_errors import reason_in_full
from pipeline.shards import write_array
from tools.options import within
from tools.verifying.checks import check_shard
from tools.verifying.files import ARRAYS, STRAY, check_checksums, check_dataset, check_index
from tools.verifying.findings import Decode, Findings, Problem, ShardCheck
from tools.verifying.samples import SAMPLED

SHOWN = 100  # problems that are printed; the rest are only counted


@dataclass
class SplitSummary:
    """The outcome for one split."""

    shards: int
    samples: int
    bytes: int
    decoded: int = 0
    damaged: int = 0  # shards


@dataclass
class Verdict:
    """The outcome for a dataset. problems: those that are listed, out of `count` in total."""

    splits: dict[str, SplitSummary] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, problems: list[Problem], count: int | None = None) -> None:
        self.problems += problems
        self.count += len(problems) if count is None else count


def check_shards(
    root: Location,
    manifest: Manifest,
    rows: dict[str, np.ndarray | None],
    checksums: dict[str, np.ndarray | None],
    decode: Decode,
    workers: int,
) -> Iterator[tuple[str, Findings]]:
    """Yield the split and the findings of each shard, in the order of dataset.json."""
    tasks = []
    for name, split in manifest.splits.items():
        ends = np.cumsum([shard.samples for shard in split.shards])
        parts = [
            [None] * len(ends) if array is None else np.split(array, ends[:-1])
            for array in (rows[name], checksums[name])
        ]
        tasks += [
            (name, ShardCheck(root, shard, own, sums, len(manifest.classes), decode, manifest.in_place))
            for shard, own, sums in zip(split.shards, *parts, strict=True)
        ]
    with (
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        pool(max(1, min(workers, len(tasks)))) as executor,
    ):
        bar = progress.add_task("checking", total=len(tasks))
        results = executor.map(check_shard, [task for _, task in tasks])
        for (name, _), found in zip(tasks, results, strict=True):
            progress.advance(bar)
            yield name, found


def verify(root: Location, decode: Decode, workers: int) -> Verdict:
    """Check the whole dataset. Raises DatasetError if there is no dataset.json to check against."""
    manifest, verdict = read_manifest(root), Verdict()
    verdict.add(check_dataset(root, manifest))
    if any(problem.file == MANIFEST_NAME for problem in verdict.problems):
        return verdict
    rows, checksums = {}, {}
    for name, split in manifest.splits.items():
        rows[name], problems = check_index(root, split, manifest)
        checksums[name], others = check_checksums(root, split)
        verdict.add(problems + others)
        size = sum(shard.bytes for shard in split.shards)
        verdict.splits[name] = SplitSummary(len(split.shards), split.samples, size)
    for name, found in check_shards(root, manifest, rows, checksums, decode, workers):
        verdict.add(found.problems, found.count)
        verdict.splits[name].decoded += found.decoded
        verdict.splits[name].damaged += found.count > 0
    return verdict


def repair(root: Path, workers: int) -> list[str]:
    """Write the files that are missing or wrong, except tars, and return the names of the files written.

    Raises DatasetError if a tar is not the one that was packed, or if the dataset was indexed in place.
    """
    manifest = read_manifest(root)
    if manifest.in_place:
        raise DatasetError(
            f"the tars in {root} were indexed in place: "
            f"to index them again, run alexnet-train make-shards --input {root} --in-place --overwrite"
        )
    problems = [problem for problem in check_dataset(root, manifest) if problem.file == MANIFEST_NAME]
    findings: dict[str, list[Findings]] = {name: [] for name in manifest.splits}
    files: dict[str, bytes] = {}
    unknown = dict.fromkeys(manifest.splits)
    checked = () if problems else check_shards(root, manifest, unknown, unknown, "none", workers)
    for name, found in checked:
        number = len(findings[name])
        tar = manifest.splits[name].shards[number].file
        problems += [problem for problem in found.problems if problem.file == tar]
        found.rows["shard"] = number
        findings[name].append(found)
        if found.index is not None:
            files[str(Path(tar).with_suffix(".idx"))] = found.index
    if problems:
        raise DatasetError(
            "\n  ".join(["nothing can be repaired because of these problems:", *listed(problems)])
        )
    for file, content in files.items():
        with atomic_write(root / file) as index:
            index.write(content)
    written, splits = list(files), dict(manifest.splits)
    for name, split in manifest.splits.items():
        splits[name], arrays = _repair_arrays(root, manifest, split, findings[name])
        written += arrays
    if splits != manifest.splits:
        write_manifest(root, manifest.model_copy(update={"splits": splits}))
        written.append(MANIFEST_NAME)
    return written


def _repair_arrays(
    root: Path, manifest: Manifest, split: Split, findings: list[Findings]
) -> tuple[Split, list[str]]:
    """Write the index and the checksums of a split if they are missing or wrong.

    Returns the split's record and the names of the files written.
    """
    written = []
    (rows, _), (checksums, _) = check_index(root, split, manifest), check_checksums(root, split)
    index = np.concatenate([found.rows for found in findings])
    if rows is None or not np.array_equal(rows, index):
        digest = write_array(root / split.index, index)
        split = split.model_copy(update={"index_sha256": digest})
        written.append(split.index)
    whole, name = np.concatenate([found.checksums for found in findings]), split.checksums
    if name is not None and (checksums is None or not np.array_equal(checksums, whole)):
        digest = write_array(root / name, whole)
        split = split.model_copy(update={"checksums_sha256": digest})
        written.append(name)
    return split, written


def listed(problems: list[Problem], count: int = 0) -> list[str]:
    """Describe the first SHOWN problems, one per line, and say how many more there are."""
    lines = [str(problem) for problem in problems[:SHOWN]]
    more = max(count, len(problems)) - len(lines)
    return [*lines, f"and {more:,} more"] if more else lines


def table(splits: dict[str, SplitSummary]) -> list[str]:
    lines = [f"{'split':8}{'shards':>10}{'damaged':>10}{'samples':>14}{'decoded':>14}{'bytes':>18}"]
    lines += [
        f"{name:8}{row.shards:10,}{row.damaged:10,}{row.samples:14,}{row.decoded:14,}{row.bytes:18,}"
        for name, row in splits.items()
    ]
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=location_of, required=True, metavar="DIR", help="folder or URL of the packed dataset")
    add("--decode", choices=get_args(Decode),
        help=f"which images to decode: all, none, or about {SAMPLED} per shard and every image of a shard "
        "whose checksum is wrong (default sampled)")  # fmt: skip
    add("--repair-index", action="store_true",
        help="rewrite the .idx files, indices and checksums that are missing or wrong")  # fmt: skip
    add("--workers", type=within(int, 1, 1024), default=cpus(), metavar="N",
        help="number of worker processes (default: one per CPU)")  # fmt: skip
    options = parser.parse_args()
    if options.repair_index and options.decode:
        parser.error("--decode has no effect with --repair-index, which decodes no image: omit one of them")
    return options


def main() -> None:
    secure()
    options = parse_arguments()
    exit_on_signals()
    try:
        if options.repair_index:
            if isinstance(options.data, str):
                raise DatasetError(
                    "--repair-index works only on a local folder: copy the dataset to one first"
                )
            written = repair(options.data, options.workers)
            print(f"written: {', '.join(written)}" if written else "nothing to repair")
            return
        verdict = verify(options.data, options.decode or "sampled", options.workers)
    except (DatasetError, WorkersError, RecursionError) as error:  # the last for JSON nested too deeply
        sys.exit(f"verify-shards: {error}")
    except OSError as error:
        reason = reason_in_full(error, options.data)
        sys.exit(
            f"verify-shards: {reason}: the check is incomplete: fix the cause and run the same command again"
        )
    except MemoryError:
        sys.exit("verify-shards: out of memory: try fewer --workers")
    except KeyboardInterrupt:
        sys.exit(130)
    print(*table(verdict.splits), sep="\n")
    if not verdict.count:
        print("sound")
        return
    print("", *listed(verdict.problems, verdict.count), "", sep="\n")
    print(f"damaged; problems found: {verdict.count:,}")
    damaged = [problem.file for problem in verdict.problems if problem.what != STRAY]
    if damaged and all(file.endswith((".idx", *ARRAYS)) for file in damaged):
        print("no tar is damaged: --repair-index rewrites the .idx files, indices and checksums")
    sys.exit(1)


if __name__ == "__main__":
    main()
