"""Check that a packed dataset is complete and undamaged, down to the byte.

    alexnet-train verify-shards --data shards

Every file named in dataset.json is read. Checksums, the structure of each tar, labels, DALI's .idx files and
the indices are compared with each other, and images are decoded. Each problem is reported with its shard, key
and byte offset; if changed pixels still decode, the sample cannot be identified and only its shard is named.
The exit code is 0 if the dataset is sound and 1 if anything is wrong.

--repair-index rewrites every .idx file and index that is missing or wrong, using the tars. If the checksum of
a tar differs from the one in dataset.json, nothing is written: copy that shard or pack it again.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import get_args

import numpy as np
from rich.console import Console
from rich.progress import Progress

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import atomic_write
from pipeline.machine import cpus
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, Split, read_manifest, write_manifest
from pipeline.output import secure
from pipeline.packing.workers import WorkersError, exit_on_signals, pool
from pipeline.retry import is_outage
from pipeline.shards import read_index, write_array
from tools.options import within
from tools.verifying.checks import SAMPLED, check_shard
from tools.verifying.findings import Decode, Findings, Problem, ShardCheck

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


def check_dataset(root: Path, manifest: Manifest) -> list[Problem]:
    """Find problems without opening a shard: wrong file names and totals, and files that no split names."""
    problems = []
    named: set[str] = set()
    for name, split in manifest.splits.items():
        tars = [shard.file for shard in split.shards]
        for file in (split.index, *tars):
            if not _is_below(file, manifest.in_place):
                problems.append(Problem(MANIFEST_NAME, f"names {file!a}, which is not a file in its folder"))
            elif file in named:
                problems.append(Problem(MANIFEST_NAME, f"names {file} twice"))
            named.add(file)
        named |= {f"{Path(tar).stem}.idx" for tar in tars}
        samples = sum(shard.samples for shard in split.shards)
        if samples != split.samples:
            problems.append(
                Problem(
                    MANIFEST_NAME,
                    f"says that {name} has {split.samples} samples, but its shards have {samples}",
                )
            )
    kinds = (".index.npy", ".partial") if manifest.in_place else (".tar", ".idx", ".index.npy", ".partial")
    strays = (path.name for path in root.iterdir() if path.name.endswith(kinds))
    problems += [Problem(file, f"is not named by {MANIFEST_NAME}") for file in sorted(set(strays) - named)]
    return problems


def _is_below(file: str, folders: bool) -> bool:
    """Return whether the packer writes such a file: in the dataset's folder or, with `folders`, below it."""
    path = PurePosixPath(file)
    return (folders or path.name == file) and file.isprintable() and path.suffix in (".tar", ".npy")


def check_index(root: Path, split: Split, manifest: Manifest) -> tuple[np.ndarray | None, list[Problem]]:
    """Return a split's rows, or None if they cannot be trusted, and problems. Raises OSError in an outage."""
    try:
        rows = read_index(root, split, len(manifest.classes))
    except (DatasetError, OSError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        return None, [Problem(split.index, str(error))]
    problems = []
    for side in ("width", "height"):
        limit = getattr(manifest, f"max_{side}")
        if (largest := rows[side].max()) > limit:
            problems.append(
                Problem(
                    MANIFEST_NAME, f"says that no {side} exceeds {limit}, but {split.index} has {largest}"
                )
            )
    return rows, problems


def check_shards(
    root: Path, manifest: Manifest, rows: dict[str, np.ndarray | None], decode: Decode, workers: int
) -> Iterator[tuple[str, Findings]]:
    """Yield the split and the findings of each shard, in the order of dataset.json."""
    tasks = []
    for name, split in manifest.splits.items():
        ends = np.cumsum([shard.samples for shard in split.shards])
        index = rows[name]
        parts = [None] * len(ends) if index is None else np.split(index, ends[:-1])
        tasks += [
            (name, ShardCheck(root, shard, part, len(manifest.classes), decode, manifest.in_place))
            for shard, part in zip(split.shards, parts, strict=True)
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


def verify(root: Path, decode: Decode, workers: int) -> Verdict:
    """Check the whole dataset. Raises DatasetError if there is no dataset.json to check against."""
    manifest, verdict = read_manifest(root), Verdict()
    verdict.add(check_dataset(root, manifest))
    if any(problem.file == MANIFEST_NAME for problem in verdict.problems):
        return verdict
    rows = {}
    for name, split in manifest.splits.items():
        rows[name], problems = check_index(root, split, manifest)
        verdict.add(problems)
        size = sum(shard.bytes for shard in split.shards)
        verdict.splits[name] = SplitSummary(len(split.shards), split.samples, size)
    for name, found in check_shards(root, manifest, rows, decode, workers):
        verdict.add(found.problems, found.count)
        verdict.splits[name].decoded += found.decoded
        verdict.splits[name].damaged += found.count > 0
    return verdict


def repair(root: Path, workers: int) -> list[str]:
    """Write the .idx and index files that are missing or wrong, and return the names of the files written.

    Raises DatasetError if a tar is not the one that was packed, or if the dataset was indexed in place.
    """
    manifest = read_manifest(root)
    if manifest.in_place:
        raise DatasetError(
            f"the tars in {root} were indexed in place: "
            f"to index them again, run alexnet-train make-shards --input {root} --in-place --overwrite"
        )
    problems = [problem for problem in check_dataset(root, manifest) if problem.file == MANIFEST_NAME]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in manifest.splits}
    files: dict[str, bytes] = {}
    unknown = dict.fromkeys(manifest.splits)
    for name, found in check_shards(root, manifest, unknown, "none", workers) if not problems else ():
        number = len(rows[name])
        tar = manifest.splits[name].shards[number].file
        problems += [problem for problem in found.problems if problem.file == tar]
        found.rows["shard"] = number
        rows[name].append(found.rows)
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
        whole, (known, _) = np.concatenate(rows[name]), check_index(root, split, manifest)
        if known is None or not np.array_equal(known, whole):
            digest = write_array(root / split.index, whole)
            splits[name] = split.model_copy(update={"index_sha256": digest})
            written.append(split.index)
    if splits != manifest.splits:
        write_manifest(root, manifest.model_copy(update={"splits": splits}))
        written.append(MANIFEST_NAME)
    return written


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
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the packed dataset")
    add("--decode", choices=get_args(Decode), default="sampled",
        help=f"which images to decode: all, none, or about {SAMPLED} per shard and every image of a shard "
        "whose checksum is wrong (default sampled)")  # fmt: skip
    add("--repair-index", action="store_true",
        help="rewrite the .idx files and indices that are missing or wrong")  # fmt: skip
    add("--workers", type=within(int, 1, 1024), default=cpus(), metavar="N",
        help="number of worker processes (default: one per CPU)")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    secure()
    options = parse_arguments()
    exit_on_signals()
    try:
        if options.repair_index:
            written = repair(options.data, options.workers)
            print(f"written: {', '.join(written)}" if written else "nothing to repair")
            return
        verdict = verify(options.data, options.decode, options.workers)
    except (DatasetError, WorkersError, RecursionError) as error:  # the last for JSON nested too deeply
        sys.exit(f"verify-shards: {error}")
    except OSError as error:
        reason = f"{error.filename or options.data}: {error.strerror or error}"
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
    if all(problem.file.endswith((".idx", ".index.npy")) for problem in verdict.problems):
        print("no tar is damaged: --repair-index rewrites the .idx files and indices")
    sys.exit(1)


if __name__ == "__main__":
    main()
