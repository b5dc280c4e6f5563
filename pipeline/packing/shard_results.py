"""Save and load the results of packed shards, from which a stopped run is continued."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from pipeline.files import atomic_write
from pipeline.manifest import HEAD_BYTES, Shard
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.shards import INDEX_DTYPE, checksum_array

SUFFIX = ".result.json"

Event = tuple[str, str, str]  # the path of a file, `repaired` or `rejected`, and the reason


@dataclass(frozen=True)
class ShardResult:
    """The result of a task.

    shard: its record in the manifest, or None if none of its images can be used. rows: its part of the index,
    [samples] of INDEX_DTYPE. checksums: those of its samples, [samples, CHECKSUM_BYTES] of uint8. sums: of
    the pixels that count towards the mean and PCA. events: the repaired and the rejected files.
    """

    shard: Shard | None
    rows: np.ndarray
    checksums: np.ndarray
    sums: PixelSums
    events: list[Event]

    @property
    def rejected(self) -> int:
        """The number of rejected images."""
        return sum(outcome == "rejected" for _, outcome, _ in self.events)


def save_result(output: Folder, name: str, result: ShardResult) -> None:
    """Save the result of the shard `name` in the output. Raises OSError."""
    record = {
        "shard": result.shard and result.shard.model_dump(),
        "rows": result.rows.tolist(),
        "checksums": [row.tobytes().hex() for row in result.checksums],
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
    """Load a shard's result, or return None if it is missing, or does not match the shard in the output.

    files: names of the files that belong to the shard. sizes: of the files in the output, in bytes, by name.
    Raises OSError.
    """
    try:
        record = json.loads(output.read(f"{STATE_FOLDER}/{name}{SUFFIX}"))
        shard = record["shard"] and Shard.model_validate(record["shard"])
        result = ShardResult(
            shard=shard,
            rows=np.array([tuple(row) for row in record["rows"]], INDEX_DTYPE),
            checksums=checksum_array(map(bytes.fromhex, record["checksums"])),
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
    if not all(sizes.get(file) for file in files) or sizes.get(shard.file) != shard.bytes:
        return None
    same = sha256(output.read(shard.file, HEAD_BYTES)).hexdigest() == shard.head_sha256
    return result if same else None
