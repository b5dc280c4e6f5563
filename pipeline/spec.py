"""net.json: everything needed to use a trained net, besides its weights.

Each run folder and each export contains it, so neither needs the dataset or the training settings to be used.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import atomic_write
from pipeline.manifest import RGB, Class, Geometry, Manifest, Side
from pipeline.retry import read_with_retries

NET_NAME = "net.json"


class SpecError(ValueError):
    """The content is not a valid net.json; the message says where it was found."""


class NetSpec(BaseModel):
    """How an image becomes the net's input, and what its outputs mean.

    The image is resized to a shorter side of `size` pixels; with geometry `256`, its central square is then
    cropped. The input [N,3,crop,crop] is the central square of `crop` pixels of the result, in RGB on the
    0–255 scale minus `mean`. Output n of [N,classes] is the logit of `classes[n]`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    geometry: Geometry
    size: Side
    crop: Side
    mean: RGB
    classes: tuple[Class, ...]

    @classmethod
    def of(cls, manifest: Manifest, crop: int) -> "NetSpec":
        """Return the spec of a net that is trained on a dataset with crops of `crop` pixels."""
        return cls(
            geometry=manifest.geometry,
            size=manifest.size,
            crop=crop,
            mean=manifest.pixels.mean,
            classes=manifest.classes,
        )

    @classmethod
    def parse(cls, content: str | bytes, source: object) -> "NetSpec":
        """Parse a net.json found in `source`. Raises SpecError, which names the source, if it is invalid."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise SpecError(f"{source} has no valid {NET_NAME}: {where}: {first['msg']}") from None

    @classmethod
    def read(cls, folder: Path) -> "NetSpec":
        """Read net.json from a folder. Raises SpecError, or OSError: FileNotFoundError if there is none."""
        return cls.parse(read_with_retries(folder / NET_NAME), folder)

    def write(self, folder: Path) -> None:
        """Write net.json into a folder atomically. Raises OSError."""
        with atomic_write(folder / NET_NAME) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")
