"""Find the runs in folders, and name those that cannot be read."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.manifest import MANIFEST_NAME
from pipeline.printable import in_line
from pipeline.remote_errors import reason_in_full
from trainer.monitor.summary import UNREADABLE, Summary, read_summary
from trainer.run import BEFORE_SETTINGS, LOCK, SETTINGS


class Found(NamedTuple):
    """The runs in some folders. problems: a line for each folder that cannot be read as a run."""

    runs: list[Summary]
    problems: list[str]


def find(folders: Iterable[Path]) -> Found:
    """Find the runs in folders at any depth; a folder may also be a run itself.

    Hidden folders, packed datasets and links to folders are skipped.
    """
    runs: dict[Path, Summary] = {}
    problems: list[str] = []
    for given in folders:
        before = len(runs) + len(problems)
        for folder in _candidates(given, problems):
            try:
                runs.setdefault(folder.resolve(), read_summary(folder))
            except UNREADABLE as error:
                problems.append(in_line(str(error)))
            except OSError as error:
                problems.append(in_line(reason_in_full(error, folder)))
        if len(runs) + len(problems) == before and not any(_is_in(run, given) for run in runs):
            problems.append(f"no run in {in_line(given)}")
    return Found(list(runs.values()), problems)


def _candidates(given: Path, problems: list[str]) -> Iterator[Path]:
    """Yield the folders that hold a run, damaged or not, in the order of their names."""

    def report(error: OSError) -> None:
        problems.append(in_line(f"{error.filename}: {error.strerror}"))

    for name, folders, files in os.walk(given, onerror=report):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        if SETTINGS in files:
            yield Path(name)
            folders.clear()
        elif LOCK in files and not folders and BEFORE_SETTINGS.issuperset(files):
            problems.append(
                f"{in_line(name)}: the run was stopped before it recorded its settings: start it again, or "
                "delete the folder"
            )
        elif MANIFEST_NAME in files:
            folders.clear()


def _is_in(run: Path, folder: Path) -> bool:
    return run.is_relative_to(folder.resolve())
