"""Tell which split a file belongs to by the words in its path."""

import re
from collections.abc import Sequence

from pipeline.packing.sources.listing import SourceError

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


def splits_named(path: str) -> set[str]:
    """Return the splits, `train` and `val`, that words in a path name."""
    return {_SPLITS[word] for word in re.findall(r"[^\W\d_]+", path.lower()) if word in _SPLITS}


def by_split(location: str, names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the files of train and of val, and the files of neither.

    If no path has a word for a split, all files belong to train. Raises SourceError if a path has words for
    both.
    """
    splits: dict[str, list[str]] = {"train": [], "val": []}
    unnamed: list[str] = []
    for name in names:
        named = splits_named(name)
        if len(named) > 1:
            raise SourceError(
                f"the path of {location}/{name} below --input names both train and val: rename it"
            )
        (splits[named.pop()] if named else unnamed).append(name)
    if len(unnamed) == len(names):
        return {"train": list(names), "val": []}, []
    return splits, unnamed


def check_splits(location: str, splits: dict[str, list[str]], kind: str, val_fraction: float | None) -> None:
    """Raise SourceError if it is unclear which images are for validation. kind: of file, for messages."""
    if not splits["train"]:
        raise SourceError(f"{location} has {splits['val'][0]}, but no {kind} is named train: add one")
    if splits["val"] and val_fraction is not None:
        raise SourceError(f"{location} already has a validation split (val): omit --val-fraction")
    if not splits["val"] and val_fraction is None:
        raise SourceError(
            f"{location} has {splits['train'][0]}, but no {kind} is named val: add one, or hold out a tenth "
            "of each class for validation with --val-fraction 0.1"
        )
