"""Open several packed datasets with the same classes as one, in which each has a share of every epoch.

A mixture is named like a folder, by FOLDER=WEIGHT,FOLDER=WEIGHT,… Its training images are those of all
datasets, and its other splits are those of the first one.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from pipeline.locations import Location, location_of
from pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, read_manifest
from pipeline.remote_errors import redact

_QUERY = re.compile(r"://.*\?")
_WEIGHT = re.compile(r"=\s*[\d.]+(?:e[+-]?\d+)?\s*$")
_NEXT = re.compile(r"\s*(?:\w+://|[./~])")


class Source(NamedTuple):
    """A dataset of a mixture. share: of the images of an epoch, greater than 0; the shares add up to 1."""

    folder: Location
    manifest: Manifest
    share: float

    @property
    def place(self) -> str:
        """The folder or URL, for messages."""
        return redact(self.folder)


class MixedManifest(Manifest):
    """The manifest of a mixture. sources: fingerprint and share of each dataset."""

    sources: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a hash of `sources`."""
        return sha256(json.dumps(self.sources).encode()).hexdigest()[:16]


def weights_of(data: Location) -> dict[Location, float]:
    """Return the folders or URLs that `data` names, and the weight of each.

    If `data` has both a comma and an equals sign, it is FOLDER=WEIGHT,…; otherwise, it is one folder. Commas
    that belong to a URL, such as those of a signature, do not count. Raises ValueError if a folder has no
    weight or comes twice, or if a weight is not a number greater than 0.
    """
    parts = [part.strip() for part in _split(str(data)) if part.strip()]
    if str(data) in parts or "=" not in str(data):
        return {data: 1.0}
    weights: dict[Location, float] = {}
    for part in parts:
        name, _, text = part.rpartition("=")
        shown = redact(name)
        if not name:
            raise ValueError(f"{part} has no weight: name several datasets as DIR=WEIGHT,DIR=WEIGHT")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(
                f"the weight of {shown} should be a number greater than 0, not {text or repr(text)}"
            )
        if location_of(name) in weights:
            raise ValueError(f"{shown} is given twice")
        weights[location_of(name)] = weight
    return weights


def _split(data: str) -> list[str]:
    """Split the names of datasets at commas.

    In the query of a URL, only a comma between a weight and the beginning of another URL or path separates.
    """
    parts: list[str] = []
    for part in data.split(","):
        if parts and _QUERY.search(parts[-1]) and not (_WEIGHT.search(parts[-1]) and _NEXT.match(part)):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def is_present(data: Location) -> bool:
    """Return whether the folders that `data` names are datasets; URLs are not looked at.

    Raises ValueError as `weights_of` does.
    """
    folders = (folder for folder in weights_of(data) if isinstance(folder, Path))
    return all((folder / MANIFEST_NAME).is_file() for folder in folders)


def change_folders(data: Location, change: Callable[[Path], Path]) -> Location:
    """Return `data` with each folder, but no URL, changed. Raises ValueError as `weights_of` does."""
    weights = weights_of(data)
    changed = {folder: change(folder) if isinstance(folder, Path) else folder for folder in weights}
    if data in weights:
        return changed[data]
    return location_of(",".join(f"{changed[folder]}={weight}" for folder, weight in weights.items()))


def read_sources(data: Location) -> list[Source]:
    """Read the manifests of the datasets that `data` names.

    Raises DatasetError if they cannot be mixed, and otherwise as `read_manifest` does.
    """
    try:
        weights = weights_of(data)
    except ValueError as error:
        raise DatasetError(f"{redact(data)}: {error}") from None
    total = sum(weights.values())
    sources = [Source(folder, read_manifest(folder), weight / total) for folder, weight in weights.items()]
    for number, source in enumerate(sources):
        for earlier in sources[:number]:
            if source.manifest.fingerprint == earlier.manifest.fingerprint:
                raise DatasetError(f"{source.place} is the same dataset as {earlier.place}: omit one of them")
        _check_alike(sources[0], source)
    return sources


def _check_alike(first: Source, other: Source) -> None:
    classes, others = ({entry.id for entry in source.manifest.classes} for source in (first, other))
    for one, its, two, theirs in ((first, classes, other, others), (other, others, first, classes)):
        if only := sorted(its - theirs):
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise DatasetError(
                f"{other.place} and {first.place} have different classes: "
                f"{one.place} has {only[0]}{more}, which {two.place} lacks"
            )
    size, another = ((source.manifest.geometry, source.manifest.size) for source in (first, other))
    if size != another:
        raise DatasetError(
            f"{other.place} has geometry {another[0]} at {another[1]} px, but {first.place} has {size[0]} "
            f"at {size[1]} px: pack them alike"
        )


def combine(sources: Sequence[Source]) -> Manifest:
    """Return the manifest of a mixture, or that of the only dataset."""
    first = sources[0].manifest
    if len(sources) == 1:
        return first
    from pipeline.colour import mix_pixels  # numpy would delay the command line's messages

    trains = [source.manifest.split("train") for source in sources]
    train = trains[0].model_copy(
        update={
            "samples": sum(split.samples for split in trains),
            "shards": tuple(shard for split in trains for shard in split.shards),
        }
    )
    return MixedManifest(
        **dict(first)
        | {
            "max_width": max(source.manifest.max_width for source in sources),
            "max_height": max(source.manifest.max_height for source in sources),
            "splits": {**first.splits, "train": train},
            "pixels": mix_pixels([(source.share, source.manifest.pixels) for source in sources]),
            "sources": [(source.manifest.fingerprint, f"{source.share:.9g}") for source in sources],
        }
    )


def read_data(data: Location) -> Manifest:
    """Return the manifest of the dataset or the mixture that `data` names. Raises as `read_sources` does."""
    return combine(read_sources(data))
