"""What is to be checked of a shard, and what was found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pipeline.manifest import Shard
from pipeline.shards import INDEX_DTYPE

Decode = Literal["all", "sampled", "none"]
KEPT = 20  # damages of a shard that are named; the others are counted


class Damage(NamedTuple):
    """What is wrong, and where: at which byte of the file, in which member of the tar."""

    file: str
    what: str
    byte: int | None = None
    member: str = ""

    def __str__(self) -> str:
        where = [self.file]
        if self.member:
            where.append(self.member if self.member.isprintable() else ascii(self.member))
        if self.byte is not None:
            where.append(f"byte {self.byte}")
        return f"{', '.join(where)}: {self.what}"


@dataclass(frozen=True)
class Task:
    """One shard to check. rows: what the index says of it, or None where there is no sound index."""

    root: Path
    shard: Shard
    rows: np.ndarray | None
    classes: int
    decode: Decode
    in_place: bool = False  # a tar of somebody else's: only what the index names in it is looked at


@dataclass
class Found:
    """What a shard holds. damages: the first KEPT of `count`. rows: what the index must say of it, with
    `shard` left 0. index: what its .idx must be, or None if that is what it is."""

    damages: list[Damage] = field(default_factory=list)
    count: int = 0
    decoded: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, INDEX_DTYPE))
    index: bytes | None = None

    def add(self, *damage) -> None:
        self.count += 1
        if self.count <= KEPT:
            self.damages.append(Damage(*damage))
