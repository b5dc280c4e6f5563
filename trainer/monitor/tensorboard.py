"""Show the tables of a run in TensorBoard: write their rows as an event file, too."""

import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter

from pipeline.documents import ContentError
from trainer.table import Table


class EventFile:
    """The only event file of a folder that is not empty. Each row of the tables is one event in it.

    At each start of a run, a new file is written from the tables, and the previous one is emptied. So each
    row is there exactly once, however the run ended before. Events keep the times at which they were first
    written. An event has a scalar for each column of its row.

    tables: the tables, by the prefix of their tags: `train` gives train/loss. hidden: columns without a tag.
    """

    def __init__(self, folder: Path, tables: Mapping[str, Table], hidden: Collection[str] = ()):
        self._folder, self._tables, self._hidden = folder, tables, {"step", *hidden}
        self._path: Path | None = None
        self._write()

    def append(self, prefix: str, row: Mapping[str, Any]) -> None:
        """Add a row that has been appended to its table.

        If it cannot be written, the whole file is written again with the next row.
        """
        path, self._path = self._path, None
        with suppress(OSError, ContentError):
            if path is None:
                self._write()
                return
            with open(path, "ab") as file:
                RecordWriter(file).write(self._event(prefix, row, time.time()).SerializeToString())
            self._path = path

    def _write(self) -> None:
        """Write a new file from the tables. Raises OSError, or ContentError if a table is damaged."""
        self._folder.mkdir(exist_ok=True)
        old = sorted(self._folder.glob("*tfevents*"))
        times = {event.step: event.wall_time for path in old for event in _read(path)}
        for path in old:
            if path.stat().st_size:
                os.truncate(path, 0)  # a TensorBoard that has it open stops at a deleted file
            else:
                path.unlink()
        now = time.time()
        # A TensorBoard that has read the earlier events forgets them at this start of a session.
        start = SessionLog(status=SessionLog.START)
        events = [Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, session_log=start)]
        for prefix, table in self._tables.items():
            events += [self._event(prefix, row, times.get(int(row["step"]), now)) for row in table.rows()]
        path = self._folder / f"events.out.tfevents.{time.time_ns()}"
        with open(path, "wb") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())
        self._path = path

    def _event(self, prefix: str, row: Mapping[str, Any], wall_time: float) -> Event:
        scalars = [
            Summary.Value(tag=f"{prefix}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in self._hidden
        ]
        return Event(step=int(row["step"]), wall_time=wall_time, summary=Summary(value=scalars))


def _read(path: Path) -> Iterator[Event]:
    """Yield the events of a file that have a step, up to the first that is incomplete."""
    events = (Event.FromString(content) for content in RawEventFileLoader(str(path)).Load())
    return (event for event in events if event.step)
