"""net.json: what one has to know to use a trained net, besides its weights.

It lies in each run folder and in each export, which can so be used without the dataset and without the
settings of the training.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import whole_file
from pipeline.manifest import Class, Geometry, Manifest, Row, Side
from pipeline.retry import read_patiently

NAME = "net.json"


class SpecError(ValueError):
    """What is not a net.json; the message names where it lies."""


class NetSpec(BaseModel):
    """How a picture becomes the net's input, and what its outputs mean.

    The picture is brought to a shorter side of `size` pixels; geometry `256` then takes its central square,
    the others do not. Of that, the central square of `crop` pixels, RGB on the 0–255 scale minus `mean`,
    is the input: [N,3,crop,crop]. Output n of [N,classes] is the logit of `classes[n]`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    geometry: Geometry
    size: Side
    crop: Side
    mean: Row
    classes: tuple[Class, ...]

    @classmethod
    def of(cls, manifest: Manifest, crop: int) -> "NetSpec":
        """That of a net trained on a dataset with crops of that size."""
        return cls(
            geometry=manifest.geometry,
            size=manifest.size,
            crop=crop,
            mean=manifest.pixels.mean,
            classes=manifest.classes,
        )

    @classmethod
    def parse(cls, content: str | bytes, place: object) -> "NetSpec":
        """Raises SpecError, naming the place, where the content is not a net.json."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            raise SpecError(f"the {NAME} of {place} is not one: {where}: {first['msg']}") from None

    @classmethod
    def read(cls, folder: Path) -> "NetSpec":
        """Raises SpecError, or OSError: FileNotFoundError where there is none."""
        return cls.parse(read_patiently(folder / NAME), folder)

    def write(self, folder: Path) -> None:
        """Whole or not at all. Raises OSError."""
        with whole_file(folder / NAME) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")
