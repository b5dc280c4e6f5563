"""Check dataset.json, and the index and checksums of each split, without opening a shard."""

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.locations import Location
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, Split
from pipeline.packing.storage import Folder
from pipeline.retry import is_outage
from pipeline.shards import read_checksums, read_index
from tools.verifying.findings import Problem

ARRAYS = (".index.npy", ".checksums.npy")  # the ends of the names of a split's arrays

STRAY = f"is not named by {MANIFEST_NAME}: delete it, or move it elsewhere"


def check_dataset(root: Location, manifest: Manifest) -> list[Problem]:
    """Find problems without opening a shard: wrong file names and totals, and files that no split names."""
    problems = []
    named: set[str] = set()
    for name, split in manifest.splits.items():
        tars = [shard.file for shard in split.shards]
        for file in (split.index, *filter(None, [split.checksums]), *tars):
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
    kinds = (*ARRAYS, ".partial") if manifest.in_place else (".tar", ".idx", *ARRAYS, ".partial")
    strays = (name for name in _names_in(root) if name.endswith(kinds))
    problems += [Problem(file, STRAY) for file in sorted(set(strays) - named)]
    return problems


def _names_in(root: Location) -> list[str]:
    """Return the names of the files in a folder, or none if they cannot be listed behind a URL."""
    if isinstance(root, Path):
        return [path.name for path in root.iterdir()]
    if root.startswith(("http://", "https://")):  # the protocol has no lists
        return []
    try:
        return list(Folder(root).sizes())
    except OSError as error:
        if is_outage(error):
            raise
        return []  # the right to read files does not include the right to list them


def _is_below(file: str, folders: bool) -> bool:
    """Return whether the packer writes such a file: in the dataset's folder or, with `folders`, below it."""
    path = PurePosixPath(file)
    return (folders or path.name == file) and file.isprintable() and path.suffix in (".tar", ".npy")


def check_index(root: Location, split: Split, manifest: Manifest) -> tuple[np.ndarray | None, list[Problem]]:
    """Return a split's rows, or None if they cannot be trusted, and problems. Raises OSError in an outage."""
    rows, problems = _read_array(split.index, partial(read_index, root, split, len(manifest.classes)))
    if rows is None:
        return None, problems
    for side in ("width", "height"):
        limit = getattr(manifest, f"max_{side}")
        if (largest := rows[side].max()) > limit:
            problems.append(
                Problem(
                    MANIFEST_NAME, f"says that no {side} exceeds {limit}, but {split.index} has {largest}"
                )
            )
    return rows, problems


def check_checksums(root: Location, split: Split) -> tuple[np.ndarray | None, list[Problem]]:
    """Return the checksums of a split's samples, or None if there are none to be trusted, and problems.

    Raises OSError in an outage.
    """
    return _read_array(split.checksums or "", partial(read_checksums, root, split))


def _read_array(file: str, read: Callable[[], np.ndarray | None]) -> tuple[np.ndarray | None, list[Problem]]:
    try:
        return read(), []
    except (DatasetError, OSError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        return None, [Problem(file, str(error))]
