"""Read samples, check each before it is used, and leave out the damaged ones.

A shard may be truncated, overwritten or lost at any time during a run, and the decoder trusts its input: on
bytes that do not begin like a JPEG, DALI may crash the process, and it allocates memory at once for whatever
size a header claims, which may be gigabytes if a bit has flipped.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from pipeline.jpeg import START, size_offset
from pipeline.manifest import DatasetError
from pipeline.reader import Files, ShardReader

_HEAD = 4096  # bytes; almost every JPEG gives its size within them
# Byte offsets to check: two from the start of the file, and four from where the file gives its size.
_OFFSETS = np.array([0, 1, 0, 1, 2, 3])


class Damage(NamedTuple):
    """A damaged sample. location: its shard and byte offset. what: what is wrong, as a predicate."""

    location: str
    what: str
    reason: Literal["unreadable", "undecodable"]

    def __str__(self) -> str:
        return f"the sample in {self.location} {self.what}"


LeaveOut = Callable[[Damage], None]


class CheckedReader:
    """A reader's samples without the damaged ones.

    leave_out: called with each damaged sample when it is first met; if None, damage raises DatasetError.
    replace: whether the next sample of the dataset replaces a damaged one, or it is simply missing.
    """

    def __init__(self, reader: ShardReader, leave_out: LeaveOut | None, replace: bool):
        self.reader, self.leave_out, self.replace = reader, leave_out, replace
        self.bad = np.zeros(len(reader), bool)
        # Where each file gives its size, as an offset in bytes; 0 until it is known.
        self._size_offsets = np.zeros(len(reader), np.int64)
        sizes = np.stack((reader.rows["height"], reader.rows["width"]), 1).astype(">u2").view(np.uint8)
        self._expected = np.insert(sizes, [0, 0], tuple(START), 1)  # each file's bytes at _OFFSETS

    def unread(self, samples: np.ndarray) -> np.ndarray:
        """Return those of the samples that have not been read yet."""
        return samples[self._size_offsets[samples] == 0]

    def read(self, samples: np.ndarray) -> tuple[np.ndarray, Files]:
        """Read samples; return the numbers of the usable ones, or of their replacements, and their files.

        Raises DatasetError as `note` does.
        """
        while True:
            samples = self._without_bad(samples)
            files = self.reader.read(samples)
            damages = self._damages(samples, files)
            if not damages:
                return samples, files
            for number, damage in damages.items():
                self.note(number, damage)

    def note(self, number: int, damage: Damage) -> None:
        """Leave a sample out from now on.

        Raises DatasetError if damage is not tolerated, or if no sample would be left.
        """
        if self.bad[number]:
            return
        if self.leave_out is None or self.bad.sum() == len(self.bad) - 1:
            raise DatasetError(f"{damage}: copy the shard again")
        self.bad[number] = True
        self.reader.forget(number)
        self.leave_out(damage)

    def note_undecodable(self, number: int) -> None:
        """Do as `note` does for a file that passed the checks but that the decoder refused."""
        self.note(number, Damage(self.reader.name(number), "cannot be decoded", "undecodable"))

    def _without_bad(self, samples: np.ndarray) -> np.ndarray:
        while (bad := self.bad[samples]).any():
            samples = np.where(bad, (samples + 1) % len(self.bad), samples) if self.replace else samples[~bad]
        return samples

    def _damages(self, samples: np.ndarray, files: Files) -> dict[int, Damage]:
        """Check the samples that were just read or never checked; return the damage by sample number.

        A check takes half a microsecond per sample, and five the first time.
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
        name, row = self.reader.name(number), self.reader.rows[number]
        if failure is not None:
            return Damage(name, failure, "unreadable")
        if found[:2].tobytes() != START:
            return Damage(name, "does not begin like a JPEG", "undecodable")
        if not self._size_offsets[number]:
            return Damage(name, "does not give the size of its image", "undecodable")
        height, width = found[2:].view(">u2").tolist()
        what = f"claims {width}×{height} px, but the index says {row['width']}×{row['height']}"
        return Damage(name, what, "undecodable")
