"""Find the earlier run that the live page compares a run with."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.printable import in_line
from trainer.monitor.summary import UNREADABLE, Summary, begun_at, differences, read_summary, shown_setting
from trainer.run import Run
from trainer.settings import Settings


class Earlier(NamedTuple):
    """An earlier run, as it was when this run started. differing: the settings that differ, in words."""

    summary: Summary
    differing: str


def find_earlier(run: Run, settings: Settings) -> tuple[Earlier | None, str]:
    """Return the run to compare with, and a line for the log if --compare names one that cannot be read.

    Without --compare, it is the run beside this one that was begun last before it, among those with the same
    recipe and dataset that have been evaluated.
    """
    recorded = run.recorded_settings()
    if settings.compare is not None:
        try:
            summary = read_summary(settings.compare)
        except (*UNREADABLE, OSError) as error:
            return None, in_line(f"not compared with {settings.compare}: {error}")
        return _compared(recorded, summary), ""
    for folder in _beside(run.folder):
        with suppress(*UNREADABLE, OSError):
            theirs = Run(folder).recorded_settings()
            if all(theirs.get(name) == recorded.get(name) for name in ("recipe", "dataset")):
                summary = read_summary(folder)
                if summary.evaluations:
                    return _compared(recorded, summary), ""
    return None, ""


def _compared(recorded: dict, summary: Summary) -> Earlier:
    differing = [
        f"{name} is {shown_setting(ours)} instead of {shown_setting(theirs)}"
        for name, (ours, theirs) in differences(recorded, summary.recorded).items()
    ]
    if recorded.get("dataset") != summary.recorded.get("dataset"):
        differing.insert(0, "the dataset is another one")
    return Earlier(summary, ", ".join(differing))


def _beside(folder: Path) -> list[Path]:
    """Return the runs beside a run that were begun before it, the one that was begun last first."""
    begun = {}
    with suppress(OSError):
        here = begun_at(folder)
        for path in folder.parent.iterdir():
            with suppress(OSError):
                if Run(path).begun and not path.samefile(folder) and begun_at(path) <= here:
                    begun[path] = begun_at(path)
    return sorted(begun, key=lambda path: (begun[path], path.name), reverse=True)
