"""Check the samples of one shard: their members, labels, JPEGs and checksums."""

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.shards import SampleLocation, checksum
from tools.verifying.findings import Findings, ShardCheck

SAMPLED = 16  # images per shard


class Member(NamedTuple):
    name: str
    offset: int  # of its content, in bytes
    content: bytes


class Samples:
    """Pairs members into samples, and compares each with its row of the index and its checksum.

    rows, checksums: those of the samples so far.
    """

    def __init__(self, task: ShardCheck, found: Findings):
        self.task, self.found = task, found
        self.locations: list[SampleLocation] = []
        self.rows: list[tuple[int, ...]] = []
        self.checksums: list[bytes] = []
        self._jpeg: Member | None = None  # waits for its label
        self._expected = None if task.rows is None else {int(row["offset"]): row for row in task.rows}
        self._checksums: dict[int, bytes] = {}  # by the offsets of the samples
        if task.rows is not None and task.checksums is not None:
            offsets = task.rows["offset"].tolist()
            self._checksums = dict(zip(offsets, map(bytes, task.checksums), strict=True))
        self._stride = {"all": 1, "sampled": -(-task.shard.samples // SAMPLED), "none": 0}[task.decode]

    def take(self, member: Member) -> None:
        jpeg, key = self._jpeg, member.name.removesuffix(".cls")
        if member.name.endswith(".jpg"):
            self._unlabelled()
            self._jpeg = member
        elif jpeg is not None and member.name.endswith(".cls") and jpeg.name == f"{key}.jpg":
            self._jpeg = None
            self._sample(key, jpeg, member)
        else:
            self._report("does not follow the .jpg of the same key", member)

    def take_indexed(self, jpeg: Member, row: np.ndarray) -> None:
        """Take the image of an in-place sample, whose label only the index gives."""
        ordinal = len(self.rows)
        image = self._open(jpeg)
        if image is not None:
            self._finish_sample(ordinal, jpeg, image, int(row["label"]), row)

    def finish(self) -> None:
        self._unlabelled()
        if self._expected:
            first, *others = sorted(self._expected)
            more = f", and {len(others)} more after it" if others else ""
            what = f"the sample that the index has at this offset is missing{more}"
            self.found.add(self.task.shard.file, what, first)

    def _report(self, what: str, member: Member) -> None:
        self.found.add(self.task.shard.file, what, member.offset, member.name)

    def _unlabelled(self) -> None:
        if self._jpeg is not None:
            self._report("is not followed by its .cls", self._jpeg)

    def _sample(self, key: str, jpeg: Member, cls: Member) -> None:
        ordinal = len(self.locations)
        location = SampleLocation(key, jpeg.offset, len(jpeg.content), cls.offset, len(cls.content))
        self.locations.append(location)
        row = None
        if self._expected is not None:
            row = self._expected.pop(jpeg.offset, None)
            if row is None:
                self._report("is not in the index", jpeg)
        label = self._label(cls)
        image = self._open(jpeg)
        if image is None or label is None:
            return
        self._finish_sample(ordinal, jpeg, image, label, row)

    def _finish_sample(
        self, ordinal: int, jpeg: Member, image: Image.Image, label: int, row: np.ndarray | None
    ) -> None:
        self.rows.append((0, jpeg.offset, len(jpeg.content), label, *image.size))
        self.checksums.append(checksum(jpeg.content))
        differs = row is not None and self._compare(jpeg, row, self.rows[-1])
        if differs or (self._stride and ordinal % self._stride == 0 and not self._decodes(jpeg, image)):
            return
        if self._checksums.get(jpeg.offset, self.checksums[-1]) != self.checksums[-1]:
            self._report("its bytes are not those that were packed", jpeg)

    def _compare(self, jpeg: Member, row: np.ndarray, found: tuple[int, ...]) -> bool:
        differs = False
        for name, value in zip(("size", "label", "width", "height"), found[2:], strict=True):
            if row[name] != value:
                self._report(f"its {name} is {value}, but the index says {row[name]}", jpeg)
                differs = True
        return differs

    def _open(self, jpeg: Member) -> Image.Image | None:
        try:
            image = Image.open(BytesIO(jpeg.content), formats=["JPEG"])
        except MemoryError:
            raise
        except Exception:  # damaged bytes may break the decoder in any way
            self._report("is not a JPEG", jpeg)
            return None
        if image.mode != "RGB" and not (self.task.in_place and image.mode == "L"):
            self._report(f"is {image.mode}, not RGB", jpeg)
        return image

    def _decodes(self, jpeg: Member, image: Image.Image) -> bool:
        self.found.decoded += 1
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            self._report(f"cannot be decoded: {error}", jpeg)
            return False
        return True

    def _label(self, cls: Member) -> int | None:
        text, classes = cls.content, self.task.classes
        if not (text.isdigit() and len(text) < 10):
            self._report(f"is {text[:20].decode('latin-1')!a}, which is not a label", cls)
        elif int(text) >= classes:
            self._report(f"its label is {int(text)}, but there are only {classes} classes", cls)
        else:
            return int(text)
        return None
