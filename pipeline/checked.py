"""Samples as they are used: read, looked at each time, and left out where they are damaged.

A shard may be cut short, written over or lost at any time of a run, and a decoder believes what it is given:
on bytes that do not begin like a JPEG DALI may crash the process, and for a size that a header claims it
makes room at once, gigabytes if a bit has flipped.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from pipeline.jpeg import START, size_place
from pipeline.manifest import DatasetError
from pipeline.reader import Files, ShardReader

_HEAD = 4096  # bytes, in which almost every JPEG says its size
_PLACES = np.array(
    [0, 1, 0, 1, 2, 3]
)  # the first two from the file's start, four from where it says its size


class Damage(NamedTuple):
    """place: shard and byte. what: is wrong with the sample there, as the end of a sentence."""

    place: str
    what: str
    reason: Literal["unreadable", "undecodable"]

    def __str__(self) -> str:
        return f"the sample in {self.place} {self.what}"


LeaveOut = Callable[[Damage], None]


class CheckedReader:
    """A reader's samples without the damaged ones.

    leave_out: told of each damaged sample when it is first met; None makes it a DatasetError.
    replace: whether the next sample of the dataset takes its place, or it is missing.
    """

    def __init__(self, reader: ShardReader, leave_out: LeaveOut | None, replace: bool):
        self.reader, self.leave_out, self.replace = reader, leave_out, replace
        self.bad = np.zeros(len(reader), bool)
        self._size_places = np.zeros(len(reader), np.int64)  # in each file; 0 until it was found
        sizes = np.stack((reader.rows["height"], reader.rows["width"]), 1).astype(">u2").view(np.uint8)
        self._expected = np.insert(sizes, [0, 0], tuple(START), 1)  # the bytes at _PLACES of each file

    def unread(self, samples: np.ndarray) -> np.ndarray:
        """Those that were not read yet."""
        return samples[self._size_places[samples] == 0]

    def read(self, samples: np.ndarray) -> tuple[np.ndarray, Files]:
        """What there is of samples, or in their places, and their files.

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
        """Leave a sample out from now on. Raises DatasetError if it must not be, or nothing would be left."""
        if self.bad[number]:
            return
        if self.leave_out is None or self.bad.sum() == len(self.bad) - 1:
            raise DatasetError(f"{damage}: copy the shard again")
        self.bad[number] = True
        self.reader.forget(number)
        self.leave_out(damage)

    def note_undecodable(self, number: int) -> None:
        """What `note` does about a file that looked sound and that the decoder did not take."""
        self.note(number, Damage(self.reader.name(number), "cannot be decoded", "undecodable"))

    def _without_bad(self, samples: np.ndarray) -> np.ndarray:
        while (bad := self.bad[samples]).any():
            samples = np.where(bad, (samples + 1) % len(self.bad), samples) if self.replace else samples[~bad]
        return samples

    def _damages(self, samples: np.ndarray, files: Files) -> dict[int, Damage]:
        """What is wrong, by the number of the sample, with those that were read just now or never looked at.
        Half a microsecond for each, and five at first."""
        unseen = np.flatnonzero(self._size_places[samples] == 0)
        for place in unseen.tolist():
            if place not in files.failures:
                jpeg = files.jpegs[place]
                at = size_place(bytes(jpeg[:_HEAD])) or size_place(bytes(jpeg))
                self._size_places[samples[place]] = at or 0
        places = np.union1d(files.fresh, unseen)
        numbers = samples[places]
        size_places = self._size_places[numbers]
        looked_at = files.starts[places, None] + _PLACES
        looked_at[:, 2:] += size_places[:, None]
        found = files.buffer.take(looked_at, mode="clip")
        wrong = (found != self._expected[numbers]).any(1) | (size_places == 0)
        wrong |= np.isin(places, list(files.failures))
        return {
            number: self._damage(number, head, files.failures.get(place))
            for number, head, place in zip(
                numbers[wrong].tolist(), found[wrong], places[wrong].tolist(), strict=True
            )
        }

    def _damage(self, number: int, found: np.ndarray, failure: str | None) -> Damage:
        """found: the bytes at _PLACES."""
        name, row = self.reader.name(number), self.reader.rows[number]
        if failure is not None:
            return Damage(name, failure, "unreadable")
        if found[:2].tobytes() != START:
            return Damage(name, "does not begin like a JPEG", "undecodable")
        if not self._size_places[number]:
            return Damage(name, "does not say the size of its picture", "undecodable")
        height, width = found[2:].view(">u2").tolist()
        what = f"claims {width}×{height} px, and the index says {row['width']}×{row['height']}"
        return Damage(name, what, "undecodable")
