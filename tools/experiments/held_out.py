"""Hold out a part of a dataset's training images, on which learning rates are chosen.

The new dataset has symbolic links to the shards, so it takes no space. Its validation split is the fewest
last training shards that hold at least a tenth of the training images, and its training split the shards
before them; the validation images of the original are not in it. Shards hold images in random order, so the
parts have the same distribution. The pixels' mean and principal components are still those of the whole
training set.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.manifest import DatasetError, Shard, Split, read_manifest, write_manifest
from pipeline.shards import read_index, write_array


def hold_out(data: Path, folder: Path) -> Path:
    """Make a dataset below `folder` that holds out the last training shards; return its path.

    The same dataset always gives the same one. Raises DatasetError if no shard would be left to train on or
    the dataset cannot be read, and OSError.
    """
    manifest = read_manifest(data)
    whole = manifest.split("train")
    count = len(whole.shards)
    before = np.cumsum([0, *(shard.samples for shard in whole.shards)])  # samples before each shard
    first = int(np.searchsorted(before, 0.9 * whole.samples, side="right")) - 1  # the first to hold out
    if not first:
        raise DatasetError(
            f"{data} has so large training shards that none would be left to train on if a tenth of the "
            "images is held out: pack it again with fewer images in a shard (--shard-samples)"
        )
    target = folder / f"held-out-{manifest.fingerprint}"
    rows = read_index(data, whole, len(manifest.classes))
    is_held_out = rows["shard"] >= first
    rows["shard"][is_held_out] -= first
    for shard in whole.shards:
        link = target / shard.file
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)  # it may lead to where the dataset was
            link.symlink_to((data / shard.file).resolve())
    splits = {
        "train": _split(target, "train", whole.shards[:first], rows[~is_held_out]),
        "val": _split(target, "val", whole.shards[first:], rows[is_held_out]),
    }
    packed = manifest.packed | {
        "held_out": f"training shards {first} to {count - 1} of {manifest.fingerprint}"
    }
    write_manifest(target, manifest.model_copy(update={"splits": splits, "packed": packed}))
    return target


def _split(folder: Path, name: str, shards: Sequence[Shard], rows: np.ndarray) -> Split:
    """Write a split's index, and return its record."""
    index = f"{name}.index.npy"
    digest = write_array(folder / index, rows)
    return Split(samples=len(rows), index=index, index_sha256=digest, shards=tuple(shards))
