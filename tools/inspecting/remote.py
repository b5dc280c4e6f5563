"""Read the samples of a dataset behind a URL for tools/inspect_shards.py, without a copy of its shards."""

import tarfile
from pathlib import Path

import numpy as np

from pipeline.locations import Location, inside
from pipeline.manifest import DatasetError, Manifest
from pipeline.packing.storage import read
from pipeline.reader import ShardReader, key_in_header
from pipeline.remote_errors import redact
from pipeline.shards import checksum, read_checksums, read_index

CONNECTIONS = 8  # threads to read with, each of which makes one request at a time


class RemoteReader:
    """Reads the samples of a split behind a URL by number, as ShardReader does those of a local one.

    If the dataset has checksums of the samples, what is read is compared with them. Its methods may be called
    from several threads. They raise DatasetError if a sample is missing or damaged, and OSError if the
    storage fails.
    """

    def __init__(self, url: str, manifest: Manifest, split: str):
        self.url, self.split = url, manifest.split(split)
        self.rows = read_index(url, self.split, len(manifest.classes))
        self._checksums = read_checksums(url, self.split)

    def __len__(self) -> int:
        return len(self.rows)

    def prefetch(self, numbers: np.ndarray) -> None:
        """Do nothing, as several threads read at the same time."""

    def jpegs(self, numbers: np.ndarray) -> list[memoryview]:
        """Return the files of consecutive samples, by a request for each shard that they are in."""
        found = []
        for shard in np.unique(self.rows["shard"][numbers]).tolist():
            own = numbers[self.rows["shard"][numbers] == shard]
            offsets = self.rows["offset"][own].astype(np.int64)
            ends = offsets + self.rows["size"][own]
            start = int(offsets.min())
            content = memoryview(self._read(shard, start, int(ends.max()) - start))
            for number, offset, end in zip(own.tolist(), offsets - start, ends - start, strict=True):
                jpeg = content[offset:end]
                if self._checksums is not None and checksum(jpeg) != self._checksums[number].tobytes():
                    raise self._damage(number, "does not match its checksum")
                found.append(jpeg)
        return found

    def jpeg(self, number: int) -> memoryview:
        """Return one sample's file."""
        return self.jpegs(np.array([number]))[0]

    def key(self, number: int) -> str:
        """Read a sample's key from its tar header."""
        shard, offset, *_ = self.rows[number].tolist()
        try:
            return key_in_header(self._read(shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE))
        except tarfile.HeaderError:
            raise self._damage(number, "has no tar header before it") from None

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        url = str(inside(self.url, self.split.shards[shard].file))
        try:
            content = read(url, offset, size)
        except FileNotFoundError:
            raise DatasetError(f"{redact(url)} is missing: upload the shard again") from None
        if len(content) < size:
            raise DatasetError(f"{redact(url)} ends too early: upload the shard again")
        return content

    def _damage(self, number: int, what: str) -> DatasetError:
        row = self.rows[number]
        url = redact(inside(self.url, self.split.shards[row["shard"]].file))
        return DatasetError(f"the sample in {url} at byte {row['offset']} {what}: upload the shard again")


Reader = ShardReader | RemoteReader


def open_reader(root: Location, manifest: Manifest, split: str) -> Reader:
    """Open a split in a folder or behind a URL. Raises DatasetError and OSError."""
    if isinstance(root, Path):
        return ShardReader(root, manifest, split)
    return RemoteReader(root, manifest, split)
