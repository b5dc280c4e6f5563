"""Show what a packed dataset contains: classes, sizes, samples and duplicates.

    alexnet-train inspect-shards --data shards --out report       # or --data s3://bucket/shards

This writes report.md with classes.png, sizes.png and samples.png; classes.tsv with the number of samples in
each class; and duplicates.tsv with the samples that occur more than once, byte for byte after packing.
Duplicates shared by the training and validation splits make the validation error look too small.
"""

import argparse
import csv
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import path_in_errors
from pipeline.locations import Location, location_of, name_of
from pipeline.machine import cpus
from pipeline.manifest import DatasetError, Manifest, read_manifest
from pipeline.output import secure
from pipeline.packing.workers import WorkersError, translate_thread_errors
from pipeline.remote_errors import reason_in_full
from tools.inspecting.remote import CONNECTIONS, Reader, open_reader
from tools.options import natural
from trainer.monitor.names import as_markdown

LISTED = 20  # classes or groups of duplicates in the report; the .tsv files list all of them
_PART = 256  # samples that a thread hashes at a time


@dataclass(frozen=True)
class OpenDataset:
    """An open dataset. counts: for each split, the number of samples of each class, [classes]."""

    manifest: Manifest
    readers: dict[str, Reader]
    counts: dict[str, np.ndarray]


class Copy(NamedTuple):
    """One of several samples with the same bytes."""

    split: str
    shard: str
    key: str
    label: int


Groups = list[list[Copy]]


def open_dataset(root: Location) -> OpenDataset:
    """Open a dataset. Raises DatasetError if it is missing or damaged, and OSError."""
    manifest = read_manifest(root)
    readers = {split: open_reader(root, manifest, split) for split in manifest.splits}
    counts = {
        split: np.bincount(reader.rows["label"], minlength=len(manifest.classes))
        for split, reader in readers.items()
    }
    return OpenDataset(manifest, readers, counts)


def find_duplicates(readers: dict[str, Reader], threads: int) -> Groups:
    """Find the groups of samples with the same bytes, in the order of their first samples.

    Threads suffice, because hashing releases Python's global interpreter lock.
    """

    def digests(part: tuple[Reader, range]) -> bytes:
        reader, numbers = part
        reader.prefetch(np.array(numbers))
        jpegs = reader.jpegs(np.array(numbers))
        return b"".join(blake2b(jpeg, digest_size=16).digest() for jpeg in jpegs)

    samples = list(readers.items())
    parts = [
        (reader, range(start, min(start + _PART, len(reader))))
        for _, reader in samples
        for start in range(0, len(reader), _PART)
    ]
    with ThreadPoolExecutor(threads) as pool:
        found = np.frombuffer(b"".join(pool.map(digests, parts)), "V16")
    _, ids, counts = np.unique(found, return_inverse=True, return_counts=True)
    ends = np.cumsum([len(reader) for _, reader in samples])
    groups: dict[int, list[Copy]] = {}
    for position in np.flatnonzero(counts[ids] > 1):
        which = int(np.searchsorted(ends, position, side="right"))
        split, reader = samples[which]
        number = int(position - ends[which] + len(reader))
        row = reader.rows[number]
        copy = Copy(split, reader.split.shards[row["shard"]].file, reader.key(number), int(row["label"]))
        groups.setdefault(int(ids[position]), []).append(copy)
    return list(groups.values())


def report(name: str, dataset: OpenDataset, groups: Groups) -> str:
    """Return the text of report.md."""
    manifest = dataset.manifest
    total = sum(map(len, dataset.readers.values()))
    lines = [
        f"# {name}: {total:,} images in {len(manifest.classes):,} classes",
        "",
        f"Geometry {manifest.geometry}, shorter side {manifest.size} px, packed by "
        f"{manifest.packed.get('by', 'an unknown packer')}; fingerprint {manifest.fingerprint}.",
        "",
        *_table(("split", "shards", "images", "MB", "per class: min", "median", "max"), _splits(dataset)),
        "",
        *_absent(dataset),
        *_outcomes(manifest),
        "## Classes",
        "",
        "![samples per class](classes.png)",
        "",
        *_extremes(dataset),
        "",
        "## Sizes",
        "",
        "![histograms of bytes, width and height](sizes.png)",
        "",
        *_table(("quantity", "split", "min", "1 %", "median", "99 %", "max"), _sizes(dataset)),
        "",
        "## Samples",
        "",
        "![samples with their labels](samples.png)",
        "",
        "## Duplicates",
        "",
        *_duplicates(dataset, groups),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    cells = [head, ["---"] * len(head), *(map(as_markdown, row) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _splits(dataset: OpenDataset) -> Iterable[tuple[str, ...]]:
    for split, reader in dataset.readers.items():
        counts, shards = dataset.counts[split], reader.split.shards
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        balance = (f"{counts.min():,}", f"{np.median(counts):,g}", f"{counts.max():,}")
        yield (split, f"{len(shards):,}", f"{len(reader):,}", f"{megabytes:,.1f}", *balance)


def _class(dataset: OpenDataset, label: int) -> str:
    entry = dataset.manifest.classes[label]
    return entry.id if entry.name == entry.id else f"{entry.id} {entry.name}"


def _absent(dataset: OpenDataset) -> list[str]:
    lines = []
    for split, counts in dataset.counts.items():
        absent = [as_markdown(_class(dataset, int(label))) for label in np.flatnonzero(counts == 0)]
        if absent:
            more = f" and {len(absent) - LISTED:,} more" if len(absent) > LISTED else ""
            lines += [f"**Classes without samples in {split}:** {', '.join(absent[:LISTED])}{more}.", ""]
    return lines


def _outcomes(manifest: Manifest) -> list[str]:
    lines = []
    for outcome, counts in (("Repaired", manifest.repaired), ("Rejected", manifest.rejected)):
        if counts:
            lines += [f"{outcome}: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) + ".", ""]
    return lines


def _extremes(dataset: OpenDataset) -> list[str]:
    """List the classes with the most and the fewest samples in the first split."""
    head, half = ("label", "class", *dataset.counts), LISTED // 2
    order = np.argsort(-next(iter(dataset.counts.values())), kind="stable").tolist()
    rows = [
        (str(label), _class(dataset, label), *(f"{counts[label]:,}" for counts in dataset.counts.values()))
        for label in (order if len(order) <= LISTED else order[:half] + order[-half:])
    ]
    title = [f"The {half} largest and the {half} smallest classes; classes.tsv lists all of them.", ""]
    return [*(title if len(order) > LISTED else []), *_table(head, rows)]


def _sizes(dataset: OpenDataset) -> Iterable[tuple[str, ...]]:
    for title, column in (("bytes", "size"), ("width", "width"), ("height", "height")):
        for split, reader in dataset.readers.items():
            marks = np.percentile(reader.rows[column], (0, 1, 50, 99, 100))
            yield (title, split, *(f"{mark:,.0f}" for mark in marks))


def _duplicates(dataset: OpenDataset, groups: Groups) -> list[str]:
    if not groups:
        return ["No two samples have the same bytes."]
    copies = sum(len(group) - 1 for group in groups)
    lines = [f"- Samples that repeat another one byte for byte: {copies:,}; groups: {len(groups):,}"]
    if "train" in dataset.readers:
        for split in [name for name in dataset.readers if name != "train"]:
            leaked = [group for group in groups if {"train", split} <= {copy.split for copy in group}]
            count = sum(copy.split == split for group in leaked for copy in group)
            if count:
                share = count / len(dataset.readers[split])
                lines.append(f"- **Samples of {split} that are also in train: {count:,} ({share:.2%})**")
    conflicts = sum(len({copy.label for copy in group}) > 1 for group in groups)
    if conflicts:
        lines.append(f"- **Groups with different labels: {conflicts:,}**")
    # The most harmful come first: groups in several splits, then groups with different labels.
    worst = sorted(groups, key=lambda group: [-len({copy[i] for copy in group}) for i in (0, 3)])
    rows = ((_names(dataset, group),) for group in worst[:LISTED])
    lines += ["", *_table(("identical images: split, key, class",), rows)]
    if len(groups) > LISTED:
        lines += ["", f"There are {len(groups) - LISTED:,} more groups; duplicates.tsv lists all of them."]
    return lines


def _names(dataset: OpenDataset, group: list[Copy]) -> str:
    names = [f"{copy.split} {copy.key} ({_class(dataset, copy.label)})" for copy in group[:6]]
    return "; ".join(names) + (f"; and {len(group) - 6:,} more" if len(group) > 6 else "")


def _write_tsv(path: Path, head: Iterable[str], rows: Iterable[Iterable]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, "excel-tab", lineterminator="\n").writerows([head, *rows])


def inspect(data: Location, output: Path, seed: int, threads: int) -> Groups:
    """Write the report and return the duplicates. Raises DatasetError or OSError."""
    dataset = open_dataset(data)
    groups = find_duplicates(dataset.readers, threads if isinstance(data, Path) else CONNECTIONS)
    output.mkdir(parents=True, exist_ok=True)
    with path_in_errors(output):
        _write(dataset, groups, name_of(data), output, seed)
    return groups


def _write(dataset: OpenDataset, groups: Groups, name: str, output: Path, seed: int) -> None:
    """Write the files of the report."""
    from tools.inspecting import figures

    classes = [(entry.id, entry.name) for entry in dataset.manifest.classes]
    _write_tsv(
        output / "classes.tsv",
        ("label", "class", "name", *dataset.counts),
        ((n, *ids, *c) for n, (ids, *c) in enumerate(zip(classes, *dataset.counts.values(), strict=True))),
    )
    _write_tsv(
        output / "duplicates.tsv",
        ("group", "split", "shard", "key", "label", "class"),
        ((n, *copy, classes[copy.label][0]) for n, group in enumerate(groups) for copy in group),
    )
    names = [entry.name for entry in dataset.manifest.classes]
    figures.draw_classes(output / "classes.png", names, dataset.counts)
    figures.draw_sizes(
        output / "sizes.png", {split: reader.rows for split, reader in dataset.readers.items()}
    )
    first = next(iter(dataset.readers.values()))
    figures.draw_samples(output / "samples.png", names, first, seed)
    (output / "report.md").write_text(
        report(name, dataset, groups), encoding="utf-8", errors="surrogateescape"
    )


def main() -> None:
    secure()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=location_of, required=True, metavar="DIR", help="folder or URL of the packed dataset")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write the report to")
    add("--seed", type=natural, default=0, help="random seed for choosing the samples to show (default 0)")
    options = parser.parse_args()
    try:
        with translate_thread_errors():
            groups = inspect(options.data, options.out, options.seed, cpus())
    except (DatasetError, WorkersError) as error:
        sys.exit(f"inspect-shards: {error}")
    except OSError as error:
        reason = reason_in_full(error, options.data)
        sys.exit(f"inspect-shards: {reason}: fix the cause and run the same command again")
    print(f"{options.out / 'report.md'}: groups of duplicates: {len(groups):,}")


if __name__ == "__main__":
    main()
