"""The job that `loader_peers.py` gives to other loaders, and the packed images in formats that they read."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # the defaults of torchvision, timm and FFCV


@dataclass(frozen=True)
class Job:
    data: Path  # folder of dataset.json
    batch: int
    crop: int
    threads: int  # or processes
    device: str = "cpu"  # or cuda: where batches are delivered
    scratch: Path = Path()  # for files converted from the shards
    resized_crops: bool = False  # random resized crops with SCALE and RATIO, instead of random crops

    def check(self) -> None:
        """Raise ValueError if the job cannot be done on this data."""
        if self.manifest["geometry"] != "256":
            raise ValueError(f"{self.data} is not packed as squares: pack it with --geometry 256")
        if not 0 < self.crop <= self.size:
            raise ValueError(f"a crop of {self.crop} px does not fit in images of {self.size} px")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            return json.loads((self.data / "dataset.json").read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"no packed dataset in {self.data}: pack one with alexnet-train make-shards"
            ) from None

    @property
    def tars(self) -> list[str]:
        return [str(self.data / shard["file"]) for shard in self.manifest["splits"]["train"]["shards"]]

    @property
    def size(self) -> int:
        """Width and height of every packed image, in pixels."""
        return self.manifest["size"]

    @property
    def scale(self) -> tuple[float, float]:
        """The bounds of the crop's share of the area of a packed image."""
        share = (self.crop / self.size) ** 2
        return SCALE if self.resized_crops else (share, share)

    @property
    def ratio(self) -> tuple[float, float]:
        """The bounds of the crop's width divided by its height, before it is resized."""
        return RATIO if self.resized_crops else (1.0, 1.0)

    def samples(self) -> Iterator[tuple[bytes, int]]:
        """Yield JPEG bytes and label, in the order of the shards."""
        for path in self.tars:
            with tarfile.open(path) as tar:
                parts = ((Path(member.name), tar.extractfile(member)) for member in tar)
                contents = {(name.stem, name.suffix): part.read() for name, part in parts if part}
            for (key, suffix), content in contents.items():
                if suffix == ".jpg":
                    yield content, int(contents[key, ".cls"])

    def files(self) -> list[tuple[str, int]]:
        """Write the samples as files in a folder for each class; return paths and labels."""
        written = []
        for number, (jpeg, label) in enumerate(self.samples()):
            path = self.scratch / "files" / f"{label:04d}" / f"{number:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
            written.append((str(path), label))
        return written
