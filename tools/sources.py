"""What there is to pack: the image files of each split, their labels and the classes' names."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class SourceError(ValueError):
    """Input that cannot be packed; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Source:
    """A file to pack; `path` is relative to the input folder."""

    path: str
    label: int


@dataclass(frozen=True)
class Sources:
    """classes: ids in the order of their labels. splits: files in sorted order. strays: files
    outside any class folder, which cannot be packed."""

    classes: list[str]
    splits: dict[str, list[Source]]
    strays: list[str]


def find_sources(root: Path, val_fraction: float | None, seed: int) -> Sources:
    """Find `train/<class>/…` and `val/<class>/…`, or with `val_fraction` `<class>/…`.

    Every file in a class folder counts, at any depth and whatever its name. Raises SourceError
    where nothing can be packed, or where it is unclear what is to be kept for validation.
    """
    folders = _split_folders(root, val_fraction)
    classes = sorted(entry.name for entry in folders["train"].iterdir() if entry.is_dir())
    if not classes:
        raise SourceError(
            f"{folders['train']} has no class folders: images are expected as "
            f"{folders['train']}/<class>/<image>"
        )
    for name in classes:
        if not name.isprintable():  # also bytes that are not UTF-8
            raise SourceError(
                f"the class folder {name!r} in {folders['train']} has a name that cannot be written"
            )
    labels = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Source]] = {split: [] for split in folders}
    strays = []
    for split, folder in folders.items():
        for entry in sorted(folder.iterdir()):
            if not entry.is_dir():
                strays.append(str(entry.relative_to(root)))
            elif entry.name not in labels:
                raise SourceError(f"the class {entry.name} is in {folder} but not in {folders['train']}")
            else:
                splits[split].extend(Source(path, labels[entry.name]) for path in _files(entry, root))
    if val_fraction is not None:
        splits = _hold_out(splits["train"], val_fraction, seed)
    for split, sources in splits.items():
        if not sources:
            raise SourceError(f"{root} has no files for the split '{split}'")
    untrained = set(range(len(classes))) - {source.label for source in splits["train"]}
    if untrained:
        names = ", ".join(classes[label] for label in sorted(untrained))
        raise SourceError(
            f"{folders['train']} has no files for the classes {names}: add some or remove the folders"
        )
    return Sources(classes, splits, strays)


def _split_folders(root: Path, val_fraction: float | None) -> dict[str, Path]:
    """Where the class folders of each split are."""
    if not root.is_dir():
        raise SourceError(f"--input {root} is not a folder")
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    if has_train and has_val and val_fraction is not None:
        raise SourceError(f"{root} has a folder val of its own: leave --val-fraction away")
    if has_train and not has_val:
        raise SourceError(
            f"{root} has a folder train but none named val: add it, or pack --input {root / 'train'} "
            "with --val-fraction 0.1 to keep a tenth for validation"
        )
    if not has_train and val_fraction is None:
        raise SourceError(
            f"{root} has no folders train and val. If it holds class folders, "
            "--val-fraction 0.1 keeps a tenth of each for validation"
        )
    return {"train": root / "train", "val": root / "val"} if has_train else {"train": root}


def _files(folder: Path, root: Path) -> list[str]:
    """All files below a folder, relative to the root and sorted."""
    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        found.extend(str(Path(where, name).relative_to(root)) for name in names)
        # Of two links to one folder it is always the same that counts, and none leads into a circle.
        real = {os.path.realpath(Path(where, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(real[path] for path in real.keys() - seen)
        seen.update(real)
    return sorted(found)


def _hold_out(sources: list[Source], fraction: float, seed: int) -> dict[str, list[Source]]:
    """The same fraction of each class for validation, drawn by the seed."""
    rng = np.random.default_rng((seed, 1))
    labels = np.array([source.label for source in sources])
    held = np.zeros(len(sources), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held[rng.permutation(members)[: round(len(members) * fraction)]] = True
    return {
        "train": [source for source, out in zip(sources, held, strict=True) if not out],
        "val": [source for source, out in zip(sources, held, strict=True) if out],
    }


def read_class_names(path: Path | None) -> dict[str, str]:
    """Names by class id, from lines of an id, white space and a name; a tab ends the name."""
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--class-names {path} cannot be read: {error}") from None
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[0]: pair[1].split("\t")[0].strip() for pair in pairs if len(pair) == 2}
