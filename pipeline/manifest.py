"""dataset.json: what a packed dataset is, and its checks when opened.

The packer writes it last, so a folder without it is not a dataset. All that a run needs to know
about its data stands in it: lengths, classes, mean, PCA; nothing is scanned and nothing is a
constant in code.
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
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from pipeline.files import whole_file
from pipeline.retry import read_patiently

FORMAT = 1
NAME = "dataset.json"
MAX_BYTES = 1 << 28  # of dataset.json; a million shards take as much
MAX_SIDE = 65535  # of an image in pixels: what a JPEG and the index can say
HEAD_BYTES = 65536  # of each shard, hashed at opening: tells a replaced shard from the packed one

Row = tuple[float, float, float]
Geometry = Literal["256", "short256", "original"]


class DatasetError(ValueError):
    """A dataset that cannot be used; the message says what is wrong and what to do."""


def _inside(name: str) -> str:
    """A file's name, which must not lead out of the dataset's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError(f"{name} is not in the dataset's folder")
    return name


Name = Annotated[str, AfterValidator(_inside)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Shard(_Record):
    """One tar file. `bytes` and both digests are of the whole file and of its first 64 KiB."""

    file: Name
    samples: PositiveInt
    bytes: PositiveInt
    sha256: str
    head_sha256: str


class Split(_Record):
    """One part of the dataset; `index` is the array with a row for each sample."""

    samples: PositiveInt
    index: Name
    index_sha256: str
    shards: tuple[Shard, ...]


class Class(_Record):
    """A class; its label is its place in `Manifest.classes`."""

    id: str
    name: str


class Pixels(_Record):
    """Statistics of the training pixels, RGB on the 0–255 scale.

    mean: [3]. eigenvalues: [3], variances along the principal components, largest first.
    eigenvectors: [3,3], column j belongs to eigenvalue j (section 4.1 of the paper).
    """

    mean: Row
    eigenvalues: Row
    eigenvectors: tuple[Row, Row, Row]


class Manifest(_Record):
    """The content of dataset.json."""

    format: Literal[1]  # FORMAT
    in_place: bool = False  # the tars are somebody else's, and may hold more than the index names
    geometry: Geometry
    size: Side  # of the shorter side in pixels, after resizing
    max_width: Side
    max_height: Side
    classes: tuple[Class, ...]
    splits: dict[str, Split]
    pixels: Pixels
    packed: dict[str, str | int | float]
    repaired: dict[str, NonNegativeInt]
    rejected: dict[str, NonNegativeInt]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ between any two different datasets."""
        return sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """The split of that name. Raises DatasetError, naming those there are."""
        if name not in self.splits:
            raise DatasetError(f"the dataset has no split '{name}', only: {', '.join(self.splits)}")
        return self.splits[name]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write dataset.json into `root`, whole or not at all."""
    with whole_file(root / NAME) as file:
        file.write(json.dumps(manifest.model_dump(), indent=1).encode() + b"\n")


def read_manifest(root: Path) -> Manifest:
    """Read `root`/dataset.json.

    Raises DatasetError if it is absent, newer, broken or absurdly large, and OSError, which names it, if it
    cannot be read.
    """
    path = root / NAME
    try:
        text = read_patiently(path, MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        state = "has no dataset.json" if root.is_dir() else "does not exist"
        raise DatasetError(
            f"no dataset at {root}: the folder {state}. "
            f"Pack one: alexnet-train make-shards --input IMAGES --out {root}"
        ) from None
    if len(text) > MAX_BYTES:
        raise DatasetError(f"{path} has more than {MAX_BYTES >> 20} MiB: it is not a dataset.json")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON ({error}). Pack the dataset again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise DatasetError(
            f"{path} has format {found} and this version reads format {FORMAT}: upgrade alexnet-train"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DatasetError(
            f"{path} is not a dataset.json: {where}: {first['msg']}. Pack the dataset again"
        ) from error
