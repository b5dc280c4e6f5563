"""Read samples, check each one before it is used, and exclude the damaged ones.

A shard may be truncated, overwritten or lost at any time during a run, and the decoder trusts its input.
DALI may crash the process on bytes that do not begin like a JPEG, and it allocates memory at once for
whatever size a header claims, which may be gigabytes if a bit has flipped.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from pipeline.jpeg import START, size_offset
from pipeline.manifest import DatasetError
from pipeline.reader import JpegFiles, ShardReader

_HEAD = 4096  # bytes; almost every JPEG gives its size within them
# Byte offsets to check: two from the start of the file, and four from where the file gives its size.
_OFFSETS = np.array([0, 1, 0, 1, 2, 3])


class Damage(NamedTuple):
    """A damaged sample.

    location: its shard and byte offset. what: what is wrong, as the predicate of a sentence.
    """

    location: str
    what: str
    reason: Literal["unreadable", "undecodable"]

    def __str__(self) -> str:
        return f"the sample in {self.location} {self.what}"


OnDamage = Callable[[Damage], None]


class CheckedReader:
    """Reads samples without the damaged ones.

    on_damage: called once with each damaged sample that is found; if None, damage raises DatasetError.
    replace: if true, as in training, the next sample of the dataset takes the place of a damaged one; if
    false, as in an evaluation, batches with damaged samples are smaller.
    """

    def __init__(self, reader: ShardReader, on_damage: OnDamage | None, replace: bool):
        self.reader, self.on_damage, self.replace = reader, on_damage, replace
        self.excluded = np.zeros(len(reader), bool)
        self._unreadable = np.zeros(len(reader), bool)  # those that were excluded for that reason
        # The offset in each file, in bytes, at which it gives the size of its image; 0 until it is known.
        self._size_offsets = np.zeros(len(reader), np.int64)
        sizes = np.stack((reader.rows["height"], reader.rows["width"]), 1).astype(">u2").view(np.uint8)
        self._expected = np.insert(sizes, [0, 0], tuple(START), 1)  # each file's bytes at _OFFSETS

    def begin_epoch(self) -> None:
        """Admit excluded samples again that may be readable again.

        In training, these are unreadable ones of shards that may be restored; in an evaluation, all.
        """
        returning = self.reader.retry_lost() & self._unreadable
        if self.replace:
            self.excluded &= ~returning
        else:
            self.excluded[:] = self._unreadable[:] = False

    def unread(self, samples: np.ndarray) -> np.ndarray:
        """Return the samples, given by number, that have not been read yet."""
        return samples[self._size_offsets[samples] == 0]

    def read(self, samples: np.ndarray) -> tuple[np.ndarray, JpegFiles]:
        """Read samples by number; return the numbers of those that were read, and their files.

        Damaged samples are excluded, and are replaced if `replace` is set. Raises DatasetError as `exclude`
        does, and OutageError if the storage cannot be read.
        """
        while True:
            samples = self._without_excluded(samples)
            files = self.reader.read(samples)
            damages = self._damages(samples, files)
            if not damages:
                return samples, files
            for number, damage in damages.items():
                self.exclude(number, damage)

    def exclude(self, number: int, damage: Damage) -> None:
        """Exclude a sample, and report its damage to `on_damage`, unless it stayed unreadable.

        Raises DatasetError if damage is not tolerated, or if no sample would remain.
        """
        if self.excluded[number]:
            return
        if self.on_damage is None or self.excluded.sum() == len(self.excluded) - 1:
            raise DatasetError(f"{damage}: copy the shard again")
        is_known, self._unreadable[number] = self._unreadable[number], damage.reason == "unreadable"
        self.excluded[number] = True
        self.reader.evict(number)
        if not is_known:
            self.on_damage(damage)

    def exclude_undecodable(self, number: int) -> None:
        """Exclude a sample that passed the checks but that the decoder refused. Raises as `exclude` does."""
        self.exclude(number, Damage(self.reader.location(number), "cannot be decoded", "undecodable"))

    def _without_excluded(self, samples: np.ndarray) -> np.ndarray:
        while (excluded := self.excluded[samples]).any():
            if not self.replace:
                return samples[~excluded]
            samples = np.where(excluded, (samples + 1) % len(self.excluded), samples)
        return samples

    def _damages(self, samples: np.ndarray, files: JpegFiles) -> dict[int, Damage]:
        """Check the samples that were just read or never checked; return their damage by sample number.

        A check takes half a microsecond per sample, or five microseconds the first time.
        """
        unseen = np.flatnonzero(self._size_offsets[samples] == 0)
        for index in unseen.tolist():
            if index not in files.failures:
                jpeg = files.jpegs[index]
                offset = size_offset(bytes(jpeg[:_HEAD])) or size_offset(bytes(jpeg))
                self._size_offsets[samples[index]] = offset or 0
        indices = np.union1d(files.fresh, unseen) if unseen.size else files.fresh
        if not indices.size:
            return {}
        numbers = samples[indices]
        size_offsets = self._size_offsets[numbers]
        offsets = files.starts[indices, None] + _OFFSETS
        offsets[:, 2:] += size_offsets[:, None]
        found = files.buffer.take(offsets, mode="clip")
        wrong = (found != self._expected[numbers]).any(1) | (size_offsets == 0)
        if files.failures:
            wrong |= np.isin(indices, list(files.failures))
        return {
            number: self._damage(number, head, files.failures.get(index))
            for number, head, index in zip(
                numbers[wrong].tolist(), found[wrong], indices[wrong].tolist(), strict=True
            )
        }

    def _damage(self, number: int, found: np.ndarray, failure: str | None) -> Damage:
        """Describe what is wrong with a sample. found: its bytes at _OFFSETS."""
        location, row = self.reader.location(number), self.reader.rows[number]
        if failure is not None:
            return Damage(location, failure, "unreadable")
        if found[:2].tobytes() != START:
            return Damage(location, "does not begin like a JPEG", "undecodable")
        if not self._size_offsets[number]:
            return Damage(location, "does not give the size of its image", "undecodable")
        height, width = found[2:].view(">u2").tolist()
        what = f"claims {width}×{height} px, but the index says {row['width']}×{row['height']}"
        return Damage(location, what, "undecodable")
