"""The result of packing a shard, saved until the dataset is complete, so that a run can be continued."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from pipeline.files import atomic_write
from pipeline.manifest import HEAD_BYTES, Shard
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.shards import INDEX_DTYPE

SUFFIX = ".result.json"

Event = tuple[str, str, str]  # path, `repaired` or `rejected`, reason


@dataclass(frozen=True)
class ShardResult:
    """The result of one task. shard: None if none of its images could be used. rows: of the index."""

    shard: Shard | None
    rows: np.ndarray
    sums: PixelSums
    events: list[Event]

    @property
    def rejected(self) -> int:
        """The number of rejected images."""
        return sum(outcome == "rejected" for _, outcome, _ in self.events)


def save_result(output: Folder, name: str, result: ShardResult) -> None:
    """Save the result of a finished shard."""
    record = {
        "shard": result.shard and result.shard.model_dump(),
        "rows": result.rows.tolist(),
        "sums": {
            "count": result.sums.count,
            "total": result.sums.total.tolist(),
            "products": result.sums.products.tolist(),
        },
        "events": result.events,
    }
    with output.staged(STATE_FOLDER) as folder, atomic_write(folder / f"{name}{SUFFIX}") as file:
        file.write(json.dumps(record).encode())


def load_result(
    output: Folder, name: str, files: Sequence[str], sizes: Mapping[str, int]
) -> ShardResult | None:
    """Load a shard's result, or return None if the shard or one of its files is missing or differs from it.

    sizes: of the files in the output, in bytes, by name.
    """
    try:
        record = json.loads(output.read(f"{STATE_FOLDER}/{name}{SUFFIX}"))
        shard = record["shard"] and Shard.model_validate(record["shard"])
        result = ShardResult(
            shard=shard,
            rows=np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE),
            sums=PixelSums(
                record["sums"]["count"],
                np.array(record["sums"]["total"], np.int64),
                np.array(record["sums"]["products"], np.int64),
            ),
            events=[(path, outcome, reason) for path, outcome, reason in record["events"]],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing or damaged: pack the shard again
        return None
    if shard is None:
        return result
    there = all(sizes.get(file) for file in files) and sizes.get(shard.file) == shard.bytes
    same = there and sha256(output.read(shard.file, HEAD_BYTES)).hexdigest() == shard.head_sha256
    return result if same else None
