"""Check that a packed dataset is whole and sound, down to the byte.

    alexnet-train verify-shards --data shards

Every file of dataset.json is read: checksums, the structure of each tar, labels, DALI's .idx and the
index are compared with each other, and pictures decoded. Each damage is named with its shard, key and byte;
only pixels that changed and still decode cannot be told from their neighbours: of these the shard is named.
Ends with 0 where all is sound and with 1 where anything is not.

--repair-index writes every .idx and index anew that is missing or wrong, from tars that have the
checksums of dataset.json. Where a tar does not, nothing is written: copy or pack it again.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import get_args

import numpy as np
from rich.progress import Progress

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import whole_file
from pipeline.machine import cpus
from pipeline.manifest import NAME, DatasetError, Manifest, Split, read_manifest, write_manifest
from pipeline.packing.workers import WorkersError, end_at_sigterm, pool
from pipeline.retry import is_outage
from pipeline.shards import read_index, write_index
from tools.options import within
from tools.verifying.checks import SAMPLED, check_shard
from tools.verifying.findings import Damage, Decode, Found, Task

SHOWN = 100  # damages that are printed; the others are counted


@dataclass
class Row:
    """What came of a split."""

    shards: int
    samples: int
    bytes: int
    decoded: int = 0
    damaged: int = 0  # shards


@dataclass
class Verdict:
    """What came of a dataset. damages: those that are named, of `count`."""

    splits: dict[str, Row] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    count: int = 0

    def add(self, damages: list[Damage], count: int | None = None) -> None:
        self.damages += damages
        self.count += len(damages) if count is None else count


def check_dataset(root: Path, manifest: Manifest) -> list[Damage]:
    """What is wrong before any shard is opened: names, sums, and files that belong to no split."""
    damages = [] if manifest.splits else [Damage(NAME, "names no split")]
    named: set[str] = set()
    for name, split in manifest.splits.items():
        tars = [shard.file for shard in split.shards]
        for file in (split.index, *tars):
            if not _is_below(file, manifest.in_place):
                damages.append(Damage(NAME, f"names {file!a}, which is no file of its folder"))
            elif file in named:
                damages.append(Damage(NAME, f"names {file} twice"))
            named.add(file)
        named |= {f"{Path(tar).stem}.idx" for tar in tars}
        samples = sum(shard.samples for shard in split.shards)
        if samples != split.samples:
            damages.append(
                Damage(NAME, f"gives {name} {split.samples} samples, and its shards {samples} together")
            )
    kinds = (".index.npy", ".partial") if manifest.in_place else (".tar", ".idx", ".index.npy", ".partial")
    strays = (path.name for path in root.iterdir() if path.name.endswith(kinds))
    damages += [Damage(file, f"is not named by {NAME}") for file in sorted(set(strays) - named)]
    return damages


def _is_below(file: str, folders: bool) -> bool:
    """Whether it is a name of ours, in the dataset's folder itself or in folders of it."""
    path = PurePosixPath(file)
    return (folders or path.name == file) and file.isprintable() and path.suffix in (".tar", ".npy")


def check_index(root: Path, split: Split, manifest: Manifest) -> tuple[np.ndarray | None, list[Damage]]:
    """The rows of a split, or None where they cannot be trusted. Raises OSError in an outage."""
    try:
        rows = read_index(root, split, len(manifest.classes))
    except (DatasetError, OSError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        return None, [Damage(split.index, str(error))]
    damages = []
    for side in ("width", "height"):
        limit = getattr(manifest, f"max_{side}")
        if (largest := rows[side].max()) > limit:
            damages.append(
                Damage(NAME, f"says that no {side} is over {limit}, and {split.index} has {largest}")
            )
    return rows, damages


def check_shards(
    root: Path, manifest: Manifest, rows: dict[str, np.ndarray | None], decode: Decode, workers: int
) -> Iterator[tuple[str, Found]]:
    """The split and what was found of each shard, in the order of dataset.json."""
    tasks = []
    for name, split in manifest.splits.items():
        ends = np.cumsum([shard.samples for shard in split.shards])
        index = rows[name]
        parts = [None] * len(ends) if index is None else np.split(index, ends[:-1])
        tasks += [
            (name, Task(root, shard, part, len(manifest.classes), decode, manifest.in_place))
            for shard, part in zip(split.shards, parts, strict=True)
        ]
    with (
        Progress(disable=not sys.stderr.isatty()) as progress,
        pool(max(1, min(workers, len(tasks)))) as executor,
    ):
        bar = progress.add_task("checking", total=len(tasks))
        results = executor.map(check_shard, [task for _, task in tasks])
        for (name, _), found in zip(tasks, results, strict=True):
            progress.advance(bar)
            yield name, found


def verify(root: Path, decode: Decode, workers: int) -> Verdict:
    """Check everything. Raises DatasetError where there is no dataset.json to check by."""
    manifest, verdict = read_manifest(root), Verdict()
    verdict.add(check_dataset(root, manifest))
    if any(damage.file == NAME for damage in verdict.damages):
        return verdict
    rows = {}
    for name, split in manifest.splits.items():
        rows[name], damages = check_index(root, split, manifest)
        verdict.add(damages)
        size = sum(shard.bytes for shard in split.shards)
        verdict.splits[name] = Row(len(split.shards), split.samples, size)
    for name, found in check_shards(root, manifest, rows, decode, workers):
        verdict.add(found.damages, found.count)
        verdict.splits[name].decoded += found.decoded
        verdict.splits[name].damaged += found.count > 0
    return verdict


def repair(root: Path, workers: int) -> list[str]:
    """Write the .idx and index files that are missing or wrong; returns the names of what was written.

    Raises DatasetError where a tar is not the one that was packed, or was packed by somebody else.
    """
    manifest = read_manifest(root)
    if manifest.in_place:
        raise DatasetError(
            f"its tars were indexed in place: make_shards --input {root} --in-place --overwrite does so again"
        )
    damages = [damage for damage in check_dataset(root, manifest) if damage.file == NAME]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in manifest.splits}
    files: dict[str, bytes] = {}
    unknown = dict.fromkeys(manifest.splits)
    for name, found in check_shards(root, manifest, unknown, "none", workers) if not damages else ():
        number = len(rows[name])
        tar = manifest.splits[name].shards[number].file
        damages += [damage for damage in found.damages if damage.file == tar]
        found.rows["shard"] = number
        rows[name].append(found.rows)
        if found.index is not None:
            files[str(Path(tar).with_suffix(".idx"))] = found.index
    if damages:
        raise DatasetError("\n  ".join(["nothing is repaired while this is wrong:", *listed(damages)]))
    for file, content in files.items():
        with whole_file(root / file) as index:
            index.write(content)
    written, splits = list(files), dict(manifest.splits)
    for name, split in manifest.splits.items():
        whole, (known, _) = np.concatenate(rows[name]), check_index(root, split, manifest)
        if known is None or not np.array_equal(known, whole):
            digest = write_index(root / split.index, whole)
            splits[name] = split.model_copy(update={"index_sha256": digest})
            written.append(split.index)
    if splits != manifest.splits:
        write_manifest(root, manifest.model_copy(update={"splits": splits}))
        written.append(NAME)
    return written


def listed(damages: list[Damage], count: int = 0) -> list[str]:
    """The first of them, a line each."""
    lines = [str(damage) for damage in damages[:SHOWN]]
    more = max(count, len(damages)) - len(lines)
    return [*lines, f"and {more:,} more"] if more else lines


def table(splits: dict[str, Row]) -> list[str]:
    lines = [f"{'split':8}{'shards':>10}{'damaged':>10}{'samples':>14}{'decoded':>14}{'bytes':>18}"]
    lines += [
        f"{name:8}{row.shards:10,}{row.damaged:10,}{row.samples:14,}{row.decoded:14,}{row.bytes:18,}"
        for name, row in splits.items()
    ]
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the packed dataset")
    add("--decode", choices=get_args(Decode), default="sampled",
        help=f"pictures: all, none, or about {SAMPLED} of each shard, and of one with a wrong checksum all "
        "(default)")  # fmt: skip
    add("--repair-index", action="store_true", help="write what is missing or wrong of .idx and index")
    add("--workers", type=within(int, 1, 1024), default=cpus(), metavar="N",
        help="processes (default: one a CPU)")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    end_at_sigterm()
    try:
        if options.repair_index:
            written = repair(options.data, options.workers)
            print(f"written: {', '.join(written)}" if written else "nothing to repair")
            return
        verdict = verify(options.data, options.decode, options.workers)
    except (DatasetError, WorkersError, RecursionError) as error:  # the last of JSON nested too deep
        sys.exit(f"verify_shards: {error}")
    except OSError as error:
        reason = f"{error.filename or options.data}: {error.strerror or error}"
        sys.exit(
            f"verify_shards: {reason}: not all could be checked: mend the cause, and give the command again"
        )
    except MemoryError:
        sys.exit("verify_shards: memory ran out: try fewer --workers")
    except KeyboardInterrupt:
        sys.exit(130)
    print(*table(verdict.splits), sep="\n")
    if not verdict.count:
        print("sound")
        return
    print("", *listed(verdict.damages, verdict.count), "", sep="\n")
    print(f"damaged: {verdict.count:,} findings")
    if all(damage.file.endswith((".idx", ".index.npy")) for damage in verdict.damages):
        print("no tar is damaged: --repair-index writes .idx and index anew")
    sys.exit(1)


if __name__ == "__main__":
    main()
