"""Hold out a part of a dataset's training images, on which learning rates are chosen.

The new dataset has symbolic links to the shards, so it takes no space. Its training split is the first nine
tenths of the training shards, its validation split the rest; the validation images of the original are not in
it. Shards hold images in random order, so the parts have the same distribution. The pixels' mean and
principal components are still those of the whole training set.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.manifest import DatasetError, Shard, Split, read_manifest, write_manifest
from pipeline.shards import read_index, write_index


def hold_out(data: Path, folder: Path) -> Path:
    """Make a dataset below `folder` that holds out the last tenth of the training shards; return its path.

    At least one shard is held out. The same dataset always gives the same one. Raises DatasetError if there
    is a single training shard or the dataset cannot be read, and OSError.
    """
    manifest = read_manifest(data)
    whole = manifest.split("train")
    count = len(whole.shards)
    if count == 1:
        raise DatasetError(
            f"{data} has a single training shard, of which no part can be held out: pack it again with fewer "
            "images in a shard (--shard-samples)"
        )
    target = folder / f"held-out-{manifest.fingerprint}"
    rows = read_index(data, whole, len(manifest.classes))
    first = count - max(1, round(count / 10))  # the first shard that is held out
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
    digest = write_index(folder / index, rows)
    return Split(samples=len(rows), index=index, index_sha256=digest, shards=tuple(shards))
