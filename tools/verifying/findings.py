"""A check of one shard, and its findings."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from pipeline.locations import Location
from pipeline.manifest import Shard
from pipeline.shards import INDEX_DTYPE, checksum_array

Decode = Literal["all", "sampled", "none"]
KEPT = 20  # problems per shard that are listed; the rest are only counted


class Problem(NamedTuple):
    """What is wrong, and where: the file and, if known, the byte offset in it and the member of the tar."""

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
class ShardCheck:
    """One shard to check.

    root: the folder or URL of the dataset. rows, checksums: the shard's part of the index and of the file of
    checksums, or None if the dataset has no sound one.
    """

    root: Location
    shard: Shard
    rows: np.ndarray | None
    checksums: np.ndarray | None
    classes: int
    decode: Decode
    in_place: bool = False  # the tar was indexed in place: only the samples that the index names are checked


@dataclass
class Findings:
    """The findings in a shard.

    problems: the first KEPT out of `count`. rows: the rows that the index must have for the shard, with
    `shard` left 0. checksums: those of the same samples. index: the content that its .idx must have, or None
    if it is correct.
    """

    problems: list[Problem] = field(default_factory=list)
    count: int = 0
    decoded: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, INDEX_DTYPE))
    checksums: np.ndarray = field(default_factory=lambda: checksum_array([]))
    index: bytes | None = None

    def add(self, *problem) -> None:
        self.count += 1
        if self.count <= KEPT:
            self.problems.append(Problem(*problem))
