"""Tell which split a folder, file or row belongs to, by the words that people use for splits.

The words are those that Hugging Face's `datasets` recognises in the names of files.
"""

import re
from collections.abc import Iterable, Sequence

from pipeline.messages import join_names
from pipeline.packing.sources.listing import SourceError

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_WORD = re.compile(r"[^\W\d_]+")
# Words that a name may have besides that of a split, as in training_set, val2017 or test-images
_OTHERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img"}


def split_of(name: str) -> str | None:
    """Return the split, `train`, `val` or `test`, whose name this is in some spelling, such as Training."""
    return _SPLIT_OF.get(name.strip().lower())


def split_folders(location: str, names: Iterable[str]) -> dict[str, str]:
    """Return the folder of each split, among folders of these names.

    A folder may also have a name such as training_set or val2017 if no other is named after its split alone.
    Raises SourceError if several folders are named after a split.
    """
    found: dict[str, str] = {}
    for close in (False, True):
        groups: dict[str, list[str]] = {}
        for name in names:
            split = _split_nearly(name) if close else split_of(name)
            if split and split not in found:
                groups.setdefault(split, []).append(name)
        for split, group in groups.items():
            if len(group) > 1:
                raise SourceError(
                    f"{location} has more than one folder for {split}: {join_names(group)}: merge them, "
                    "or remove all but one"
                )
            found[split] = group[0]
    return found


def _split_nearly(name: str) -> str | None:
    words = [word for word in _WORD.findall(name.lower()) if word not in _OTHERS]
    return _SPLIT_OF.get(words[0].removesuffix("set")) if len(words) == 1 else None


def splits_named(path: str) -> set[str]:
    """Return the splits, `train` and `val`, that words in a path name, or else `test` if they name that."""
    named = {_SPLIT_OF[word] for word in _WORD.findall(path.lower()) if word in _SPLIT_OF}
    return named - {"test"} or named


def by_split(location: str, names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the files of train, of val and of test, and the files of none.

    If no path has a word for train or val, those without a word for test belong to train, or all if there are
    no others. Raises SourceError if a path has words for both train and val.
    """
    splits: dict[str, list[str]] = {split: [] for split in _SPLITS}
    unnamed: list[str] = []
    for name in names:
        named = splits_named(name)
        if len(named) > 1:
            raise SourceError(
                f"the path of {location}/{name} below --input names both train and val: rename it"
            )
        (splits[named.pop()] if named else unnamed).append(name)
    if splits["train"] or splits["val"]:
        return splits, unnamed
    if unnamed:
        return splits | {"train": unnamed}, []
    return splits | {"train": list(names), "test": []}, []


def check_splits(location: str, found: dict[str, list[str]], kind: str, val_fraction: float | None) -> None:
    """Raise SourceError if it is unclear which images are for validation.

    found: names of what there is for each split. kind: what these are, such as `folder`, for messages.
    """
    train, val, test = (found.get(split, []) for split in _SPLITS)
    if not train:
        other = (val or test)[0]
        raise SourceError(
            f"{location} has {other}, but no {kind} is named train: add one, or rename {other} if it is not "
            "a split"
        )
    if val and val_fraction is not None:
        raise SourceError(f"{location} already has a validation split ({val[0]}): omit --val-fraction")
    if not val and val_fraction is None:
        raise SourceError(
            f"{location} has {train[0]}, but no {kind} is named val: add one, or hold out a tenth "
            "of each class for validation with --val-fraction 0.1"
            + (f". To validate on {test[0]}, if it has labels, rename it to val" if test else "")
        )
