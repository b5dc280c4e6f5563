"""Summarise a run folder, for a table or a page over several runs. This module does not import torch."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from pipeline.documents import ContentError
from pipeline.spec import NET_NAME, NetSpec, SpecError
from trainer.run import REPORT, SETTINGS, Run, RunError
from trainer.setting_sources import read_recipe
from trainer.settings import CHANGEABLE, Settings, SettingsError

Row = Mapping[str, float]
UNREADABLE = SettingsError, RunError, SpecError, ContentError  # what read_summary raises, besides OSError
TOP5_CLASSES = 6  # the fewest classes for which the top-5 error is shown; with fewer, it is always 0


@dataclass(frozen=True)
class Summary:
    """The recorded settings of a run, the rows of its tables, and when it was last changed.

    classes: number of classes, or None if the folder does not say. changed: a Unix time.
    """

    folder: Path
    recorded: Mapping[str, Any]
    classes: int | None
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    is_finished: bool
    changed: float

    @property
    def recipe(self) -> str:
        """The name of the recipe, or that of its file."""
        return Path(self.recorded.get("recipe", Settings.model_fields["recipe"].default)).stem

    @property
    def epochs(self) -> int:
        """The number of epochs that the run is to have."""
        return self.recorded.get("epochs", Settings.model_fields["epochs"].default)

    @property
    def epoch(self) -> float:
        """The number of epochs done at the last log interval or evaluation."""
        return max((rows[-1]["epoch"] for rows in (self.steps, self.evaluations) if rows), default=0.0)

    @property
    def state(self) -> str:
        """What has become of the run, in a word or two."""
        if self.is_finished:
            return "stopped early" if self.epoch < self.epochs else "finished"
        return "unfinished" if self.steps else "no steps yet"

    @property
    def best(self) -> Row | None:
        """The evaluation with the lowest top-1 error, the first of several."""
        return best_of(self.evaluations)

    @property
    def last(self) -> Row | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def with_top5(self) -> bool:
        """Whether the top-5 error is to be shown."""
        return self.classes is not None and self.classes >= TOP5_CLASSES

    @property
    def images_per_second(self) -> float:
        """The median over the log intervals; NaN without any."""
        rates = [row["images_per_second"] for row in self.steps if math.isfinite(row["images_per_second"])]
        return median(rates) if rates else math.nan

    @property
    def training_seconds(self) -> float:
        """The duration of all training steps, without evaluations and checkpoints."""
        batch = self.recorded.get("batch", Settings.model_fields["batch"].default)
        seconds, before = 0.0, 0.0
        for row in self.steps:
            if row["images_per_second"] > 0:
                seconds += (row["step"] - before) * batch / row["images_per_second"]
            before = row["step"]
        return seconds


def best_of(evaluations: Sequence[Row]) -> Row | None:
    """Return the evaluation with the lowest top-1 error, the first of several, or None without any."""
    finite = [row for row in evaluations if math.isfinite(row["top1_error"])]
    return min(finite, key=lambda row: row["top1_error"], default=None)


def row_at(epoch: float, rows: Sequence[Row]) -> Row | None:
    """Return the last row that is not after `epoch` epochs, or None without any."""
    return next((row for row in reversed(rows) if row["epoch"] <= epoch + 1e-6), None)


def read_summary(folder: Path) -> Summary:
    """Read a run folder, also while the run is being trained.

    Raises SettingsError if it holds no run, RunError, SpecError or ContentError if a file is damaged, and
    OSError if one cannot be read.
    """
    run = Run(folder)
    recorded = run.recorded_settings()
    classes: int | None = None
    with suppress(FileNotFoundError):  # a run of an earlier version has no net.json
        classes = len(NetSpec.read(folder).classes)
    paths = (folder / SETTINGS, run.metrics.path, run.evaluations.path, folder / REPORT)
    return Summary(
        folder,
        recorded,
        classes,
        run.metrics.rows(),
        run.evaluations.rows(),
        run.is_finished,
        changed=max(path.stat().st_mtime for path in paths if path.exists()),
    )


def begun_at(folder: Path) -> float:
    """Return when a run was begun, as a Unix time: net.json is written then and never again."""
    net = folder / NET_NAME
    return (net if net.exists() else folder / SETTINGS).stat().st_mtime


def differences(recorded: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that define what a run computes and that differ between two runs.

    recorded, other: the content of their settings.json. Returns both values by the name of the setting.
    """
    ours, theirs = _defining(recorded), _defining(other)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def changed_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that define what a run computes and that are not those of its recipe.

    They are empty if the recipe can no longer be read.
    """
    try:
        recipe = Settings.model_validate(read_recipe(recorded["recipe"])).model_dump(mode="json")
    except (SettingsError, ValidationError, KeyError, OSError):
        return {}
    return {name: ours for name, (ours, _) in differences(recorded, recipe).items()}


def shown_setting(value: Any) -> str:
    """Return the value of a setting as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ",".join(f"{name}={each:g}" for name, each in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ",".join(f"{each:g}" for each in value) or "none"
    return "none" if value is None else str(value)


def _defining(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that define what a run computes, with defaults for those that are missing."""
    whole = Settings.model_construct().model_dump(mode="json") | dict(recorded)
    return {name: whole[name] for name in Settings.model_fields if name not in CHANGEABLE}
