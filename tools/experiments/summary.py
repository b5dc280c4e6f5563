"""Write results.md from the records in --out: the paper's numbers next to the measured ones.

alexnet-train paper report
"""

import argparse
from pathlib import Path

from tools.experiments import EXPERIMENTS
from tools.experiments.record import Record
from trainer.settings import SettingsError

TAKES_SETTINGS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: this command takes only --out."""


def run(options: argparse.Namespace, _settings: list[str]) -> Path:
    """Write results.md; return its path.

    Raises RecordError for a file that is not a record, and SettingsError if there are no records.
    """
    paths = [options.out / f"{name}.json" for name in EXPERIMENTS]
    records = [Record.read(path) for path in paths if path.exists()]
    if not records:
        raise SettingsError(
            f"no records in {options.out}: run an experiment first, see alexnet-train paper --help"
        )
    path = options.out / "results.md"
    title = "# The paper's results, measured"
    legend = "A value from several seeds is their mean, with the minimum and maximum."
    path.write_text("\n\n".join([title, legend, *map(str, records)]) + "\n", encoding="utf-8")
    return path
