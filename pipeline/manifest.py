"""Read and write dataset.json, the manifest of a packed dataset.

The packer writes it last, so a folder without it is not a dataset. It holds everything that a run needs to
know about its data (lengths, classes, mean and PCA), so that no run scans the data, and the code holds no
constants of a particular dataset.
"""

import json
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
)

from pipeline.documents import ContentError, parse_record
from pipeline.files import atomic_write
from pipeline.locations import Location, inside
from pipeline.remote_errors import redact
from pipeline.storage import read_start

FORMAT = 1
MANIFEST_NAME = "dataset.json"
MAX_BYTES = 1 << 28  # largest dataset.json that is read; a million shards take about as much
MAX_SIDE = 65535  # largest side of an image, in pixels, that a JPEG and the index can hold
_READINGS = 5  # of a dataset.json behind a URL, after which it is given up
HEAD_BYTES = 65536  # the part of a shard that is hashed when it is opened, to detect a replaced shard

RGB = tuple[FiniteFloat, FiniteFloat, FiniteFloat]  # one value per channel
Geometry = Literal["256", "short256", "original"]


class DatasetError(ValueError):
    """A dataset cannot be used; the message says what is wrong and what to do."""


def _check_inside_folder(name: str) -> str:
    """Return the name. Raises ValueError if it leads out of the dataset's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError(f"{name} is not in the dataset's folder")
    return name


FileName = Annotated[str, AfterValidator(_check_inside_folder)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Size = Annotated[int, Field(gt=0, lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Shard(_Record):
    """A tar file. bytes, sha256: size and hash of the whole file. head_sha256: hash of its first 64 KiB."""

    file: FileName
    samples: Size
    bytes: Size
    sha256: str
    head_sha256: str


class Split(_Record):
    """A split of the dataset.

    index: the name of the file with a row for each sample. checksums: the name of the file with a checksum of
    each sample, which datasets of earlier versions lack (both in pipeline/shards.py).
    """

    samples: Size
    index: FileName
    index_sha256: str
    shards: tuple[Shard, ...]
    checksums: FileName | None = None
    checksums_sha256: str | None = None


class Class(_Record):
    """A class; its label is its index in `Manifest.classes`."""

    id: str
    name: str


class Pixels(_Record):
    """Statistics of the training pixels, RGB on the 0–255 scale.

    mean: [3]. eigenvalues: [3], the variances along the principal components, largest first. eigenvectors:
    [3,3], whose column j belongs to eigenvalue j (section 4.1 of the paper).
    """

    mean: RGB
    eigenvalues: RGB
    eigenvectors: tuple[RGB, RGB, RGB]


class Manifest(_Record):
    """The content of dataset.json.

    packed: the program and options that packed it. repaired, rejected: number of files by reason.
    """

    format: Literal[1]  # FORMAT
    in_place: bool = False  # the tars were only indexed, and may hold files that are not in the index
    geometry: Geometry
    size: Side  # length of the shorter side after resizing, in pixels
    max_width: Side
    max_height: Side
    classes: Annotated[tuple[Class, ...], Field(min_length=1)]
    splits: Annotated[dict[str, Split], Field(min_length=1)]
    pixels: Pixels
    packed: dict[str, str | int | float]
    repaired: dict[str, NonNegativeInt]
    rejected: dict[str, NonNegativeInt]

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a hash of the manifest, to tell datasets apart.

        Fields that the manifest lacks are not hashed, so a new optional field changes no old fingerprint.
        """
        return sha256(self.model_dump_json(exclude_none=True).encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """Return the split of that name. Raises DatasetError, which lists the existing splits."""
        if name not in self.splits:
            raise DatasetError(f"the dataset has no split '{name}'; it has: {', '.join(self.splits)}")
        return self.splits[name]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write dataset.json into `root` atomically. Raises OSError."""
    with atomic_write(root / MANIFEST_NAME) as file:
        file.write(json.dumps(manifest.model_dump(exclude_none=True), indent=1).encode() + b"\n")


def read_manifest(root: Location) -> Manifest:
    """Read dataset.json in a folder or behind a URL.

    Raises DatasetError if it is missing, broken, absurdly large, of a newer format or different at each
    reading, and OSError, which names the file, if it cannot be read.
    """
    path = inside(root, MANIFEST_NAME)
    try:
        text = _read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if isinstance(root, str):
            problem = f"{redact(path)} does not exist"
        else:
            problem = f"the folder {'has no dataset.json' if root.is_dir() else 'does not exist'}"
        place = redact(root)
        raise DatasetError(
            f"no dataset at {place}: {problem}. "
            f"Pack one: alexnet-train make-shards --input IMAGES --out {place}"
        ) from None
    name = redact(path)
    if len(text) > MAX_BYTES:
        raise DatasetError(f"{name} is larger than {MAX_BYTES >> 20} MiB, so it is not a dataset.json")
    try:
        return parse_record(Manifest, text, FORMAT, name, "Copy the dataset again, or pack it again")
    except ContentError as error:
        raise DatasetError(str(error)) from None


def _read(path: Location) -> bytes:
    """Read dataset.json, and a little more if it is too large.

    It has the checksums of all other files, but none of its own, and may be garbled on its way from a URL.
    Therefore it is read until it arrives twice alike. Raises DatasetError if it never does.
    """
    text = read_start(path, MAX_BYTES + 1)
    if isinstance(path, Path):
        return text
    for _ in range(_READINGS - 1):
        previous, text = text, read_start(path, MAX_BYTES + 1)
        if text == previous:
            return text
    raise DatasetError(
        f"{redact(path)} arrives differently each time it is read: check the network, or run again once the "
        "upload is complete"
    )
