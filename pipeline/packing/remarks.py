"""Remarks about a packed dataset for its user: what was ignored, and what is missing."""

from collections.abc import Collection
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np

from pipeline.manifest import Manifest
from pipeline.messages import join_names, pluralize
from pipeline.packing.sources.find import Sources, describe_unlisted
from pipeline.packing.storage import Folder


@dataclass(frozen=True)
class Remarks:
    """Sentences for the user.

    notes: what was left out on purpose. warnings: what may be a mistake. faults: what makes the dataset
    unsuitable for training; they make the exit code 1.
    """

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def remarks_about(sources: Sources, manifest: Manifest, output: Folder) -> Remarks:
    """Return the remarks about a complete dataset. Raises OSError if an index cannot be read."""
    remarks = Remarks()
    if sources.litter:
        remarks.notes.append(_describe_litter(sources.litter))
    if sources.unused:
        remarks.notes.append(f"not used, as neither train nor val: {join_names(sources.unused)}")
    if len(sources.classes) == 1:
        remarks.faults.append(f"there is only one class, {sources.classes[0]}, so there is nothing to learn")
    for split, lost in _lost(sources, manifest, output).items():
        if lost:
            found = remarks.faults if split == "train" else remarks.warnings
            amount = pluralize(len(lost), "class", "classes")
            found.append(f"all images of {split} were rejected in {amount}: {join_names(lost)}")
    if sources.unlisted:
        remarks.faults.append(
            f"{describe_unlisted(sources.unlisted)}. Images are missing from the dataset: make every "
            "folder readable, and run the same command with --overwrite"
        )
    return remarks


def _describe_litter(litter: Collection[str]) -> str:
    names = sorted({path.rpartition("/")[2].strip() for path in litter})  # macOS's Icon ends in a line break
    amount = pluralize(len(litter), "file or folder", "files and folders")
    return f"ignored {amount} that desktops and archivers leave ({join_names(names)})"


def _lost(sources: Sources, manifest: Manifest, output: Folder) -> dict[str, list[str]]:
    """Return the classes of each split that had files, but have no images."""
    lost = {}
    for split, images in sources.splits.items():
        index = np.load(BytesIO(output.read(manifest.split(split).index)))
        labels = {source.label for source in images} - set(np.unique(index["label"]).tolist())
        lost[split] = [sources.classes[label] for label in sorted(labels)]
    return lost
