"""Read and write net.json, which holds everything that is needed to use a trained net, besides its weights.

Each run folder and each export contains it, so using a net requires neither the dataset nor the settings of
its training.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.documents import ContentError, parse_record
from pipeline.files import atomic_write
from pipeline.manifest import RGB, Class, Geometry, Manifest, Side
from pipeline.retry import read_with_retries

FORMAT = 1
NET_NAME = "net.json"


class SpecError(ValueError):
    """The content of a net.json is not valid; the message names its source."""


class NetSpec(BaseModel):
    """How an image becomes the net's input, and what its outputs mean.

    The image is resized to a shorter side of `size` pixels; with geometry `256`, it is then cropped to its
    central square. The input [N,3,crop,crop] is the central square of `crop` pixels of the result, in RGB on
    the 0–255 scale minus `mean`. Column k of the output [N,classes] is the logit of `classes[k]`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1  # FORMAT
    geometry: Geometry
    size: Side
    crop: Side
    mean: RGB
    classes: Annotated[tuple[Class, ...], Field(min_length=1)]

    @classmethod
    def from_manifest(cls, manifest: Manifest, crop: int, mean: RGB | None = None) -> "NetSpec":
        """Return the spec of a net that is trained on a dataset with crops of `crop` pixels.

        mean: to be subtracted instead of the dataset's own mean.
        """
        return cls(
            geometry=manifest.geometry,
            size=manifest.size,
            crop=crop,
            mean=mean or manifest.pixels.mean,
            classes=manifest.classes,
        )

    @classmethod
    def parse(cls, content: str | bytes, source: object, remedy: str) -> "NetSpec":
        """Parse the content of a net.json.

        source: where it was found. remedy: a sentence that says what to do about damage. Both are in the
        SpecError that is raised if the content is not valid.
        """
        try:
            spec = parse_record(cls, content, FORMAT, f"the {NET_NAME} of {source}", remedy)
        except ContentError as error:
            raise SpecError(str(error)) from None
        if spec.crop > spec.size:
            what = f"crops of {spec.crop} pixels do not fit into images of {spec.size}"
            raise SpecError(f"the {NET_NAME} of {source} is not valid: {what}. {remedy}")
        return spec

    @classmethod
    def read(cls, folder: Path) -> "NetSpec":
        """Read net.json from a folder. Raises SpecError, and OSError (FileNotFoundError if there is none)."""
        remedy = "Delete it, and it will be made again from the dataset"
        return cls.parse(read_with_retries(folder / NET_NAME), folder, remedy)

    def write(self, folder: Path) -> None:
        """Write net.json into a folder atomically. Raises OSError."""
        with atomic_write(folder / NET_NAME) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")
