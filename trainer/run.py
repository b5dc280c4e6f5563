"""Manage the run folder, which holds everything about one run and nothing about any other run.

settings.json      the settings, the dataset's fingerprint, and what `auto` resolved to when the run began
net.json           everything that is needed to use the net; see pipeline/spec.py
environment.json   versions, commit and hardware of each start
metrics.csv        one row per log interval
evaluations.csv    one row per evaluation
tensorboard/       the rows of both as an event file, with --tensorboard
other tables       what the last evaluation found; see trainer/details.py
checkpoints/       see trainer/checkpoint.py
report.md, *.png   written at the end of the run
.lock              locked by the process that trains; the system releases the lock when that process ends
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.documents import ContentError, message_of, read_json
from pipeline.files import atomic_write, close_quietly, sync_folder
from pipeline.locations import location_of
from pipeline.manifest import DatasetError, Manifest
from pipeline.mixture import change_folders, is_present, read_data, weights_of
from pipeline.remote_errors import redact
from pipeline.spec import NET_NAME, NetSpec, SpecError
from trainer.environment import environment
from trainer.lock import LockedError, open_locked
from trainer.settings import CHANGEABLE, Resolved, Settings, SettingsError
from trainer.table import Table

T = TypeVar("T")
REPORT = "report.md"
SETTINGS, _ENVIRONMENT, LOCK = "settings.json", "environment.json", ".lock"
# In settings.json: what `auto` resolved to when the run began, and the dataset's path from the run folder.
_RESOLVED, _DATA_FROM_RUN = "resolved", "data_from_run"
_STARTS = TypeAdapter(list[dict[str, str]])  # the structure of environment.json
_ONLY_FORM = {"convolutions": "grouped"}  # of the versions that did not record the form
# Files that may remain if the first start is killed early.
BEFORE_SETTINGS = {LOCK, f".{SETTINGS}.partial", NET_NAME, f".{NET_NAME}.partial"}


class RunError(ValueError):
    """The run cannot go on. The message says why, and what to do."""


class PeerLostError(RunError):
    """Another process of the run has ended. The run may succeed when it is started again."""


class _Recorded(BaseModel):
    """The content of settings.json; the settings are its extra fields."""

    model_config = ConfigDict(extra="allow")

    dataset: str = ""
    data_from_run: str | None = None
    resolved: Resolved = None  # type: ignore[assignment]  # may be missing, but not null

    def settings(self) -> Settings:
        """Return the settings. Raises ValidationError.

        Earlier versions recorded infinity as null. A changeable setting that is null has its default.
        """
        settings = self.model_extra or {}
        return Settings.model_validate(
            {name: value for name, value in settings.items() if value is not None or name not in CHANGEABLE}
        )


_RECORDED = TypeAdapter(_Recorded)


class Run:
    """A run folder, which may not exist yet.

    Its methods raise OSError, with the file's name, if a file cannot be read or written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        position = ("step", "epoch", "loss")
        self.metrics = Table(folder / "metrics.csv", (*position, "error", "images_per_second"))
        self.evaluations = Table(folder / "evaluations.csv", (*position, "top1_error", "top5_error"))
        self.checkpoints = folder / "checkpoints"

    def begin(self, settings: Settings, manifest: Manifest) -> TextIO:
        """Create and lock the folder, or lock it after a check that it holds this run.

        Returns the lock. No other process can begin the run until the lock is closed or this process has
        ended. Raises SettingsError if the folder holds another run or files that are not of a run.
        Raises RunError if another process is training the run.
        """
        is_new = self.check_is_new(settings, manifest)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        if is_new and self.check_is_new(settings, manifest):  # another process may have begun it in between
            NetSpec.from_manifest(manifest, settings.crop, settings.pixel_mean).write(self.folder)
            record = _identity(settings, manifest.fingerprint, whole=True)
            folders = (folder for folder in weights_of(settings.data) if isinstance(folder, Path))
            if not all(folder.is_absolute() for folder in folders):
                record[_DATA_FROM_RUN] = str(change_folders(settings.data, self._path_from_run))
            _write_json(self.folder / SETTINGS, record)
        return lock

    def _lock(self) -> TextIO:
        """Lock the folder, which exists, and return the lock. Raises RunError as `begin` does."""
        try:
            return open_locked(self.folder / LOCK)
        except LockedError as owner:
            raise RunError(
                f"{self.folder} is being trained by {owner}: wait for it, stop it, or choose another --out"
            ) from None

    def check_is_idle(self) -> None:
        """Raise RunError if another process is training the run."""
        if (self.folder / LOCK).exists():
            close_quietly(self._lock())

    def _path_from_run(self, path: Path) -> Path:
        return Path(os.path.relpath(path.resolve(), self.folder.resolve()))

    def adopt(self, settings: Settings, net: NetSpec, origin: str) -> None:
        """Create the folder of a run whose weights were trained elsewhere; the caller adds the checkpoint.

        origin: where the weights are from. It is recorded in place of a dataset's fingerprint and matches no
        dataset, so the run can be evaluated and used, but not continued. Raises SettingsError if the folder
        is not empty.
        """
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise SettingsError(f"{self.folder} is not empty: choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        net.write(self.folder)
        _write_json(self.folder / SETTINGS, _identity(settings, origin, whole=True))

    def check_is_new(self, settings: Settings, manifest: Manifest) -> bool:
        """Check that the folder is free or holds this run, and return whether it is free.

        Raises SettingsError if it holds another run, naming the differences, or files that are not of a run,
        and otherwise as `recorded_settings` does.
        """
        identity = _identity(settings, manifest.fingerprint)
        recorded = self._recorded()
        if recorded is not None:
            # If settings are missing, an earlier version began the run, which had only their defaults.
            held = Settings.model_construct().model_dump(mode="json") | _ONLY_FORM | recorded
            resolved = recorded.get(_RESOLVED, {})
            held |= {name: resolved[name] for name in ("precision", "convolutions") if name in resolved}
            differing = [
                f"{key} ({held.get(key)} there, {identity.get(key)} here)"
                for key in identity
                if held.get(key) != identity[key] and "auto" not in (held.get(key), identity[key])
            ]
            if differing:
                raise SettingsError(
                    f"{self.folder} already holds another run, which differs in {', '.join(differing)}: "
                    "choose another --out, or use that run's settings to continue it"
                )
            return False
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} - BEFORE_SETTINGS:
            raise SettingsError(
                f"{self.folder} is not empty and has no {SETTINGS}, so it is not a run: choose another --out"
            )
        return True

    def keep_resolved(self, settings: Settings, resolved: Mapping[str, str]) -> None:
        """Record what `auto` resolved to when the run begins, and compare it at each later start.

        resolved: the `device`, cpu or cuda, and the `precision`. The device may differ if the settings name
        it. Raises SettingsError if the device or the precision would change only because of `auto`.
        """
        held = self.recorded_settings()
        began = held.get(_RESOLVED)
        if began is None:  # the run is new, or begun by an earlier version, which did not record it
            _write_json(self.folder / SETTINGS, {**held, _RESOLVED: dict(resolved)})
            return
        changed = [name for name in resolved if resolved[name] != began[name]]
        if settings.device != "auto" and "device" in changed:
            changed.remove("device")
        if changed:
            old = " and ".join(f"{name} {began[name]}" for name in changed)
            new = " and ".join(resolved[name] for name in changed)
            keep = {"precision": began["precision"], "device": resolved["device"]}
            flags = " ".join(f"--{name} {keep[name]}" for name in changed)
            raise SettingsError(
                f"{self.folder} began with {old}, and auto is {new} on this machine: "
                f"add {flags} to continue it here, or choose another --out"
            )

    def keep_form(self, choose: Callable[[], str]) -> str:
        """Return the form of the convolutions that is recorded, or else call `choose` and record its result.

        Raises as `recorded_settings` does.
        """
        held = self.recorded_settings()
        began = held.get(_RESOLVED, {}) if "convolutions" in held else _ONLY_FORM
        if "convolutions" in began:
            return began["convolutions"]
        form = choose()
        _write_json(self.folder / SETTINGS, {**held, _RESOLVED: {**began, "convolutions": form}})
        return form

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / SETTINGS).exists()

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete, which means that its report has been written."""
        return (self.folder / REPORT).exists()

    def sync(self) -> None:
        """Write all rows of the tables to the disk. Called before each checkpoint is written."""
        self.metrics.sync()
        self.evaluations.sync()
        sync_folder(self.folder)

    def settings(self) -> Settings:
        """Return the settings that the run began with. Raises as `recorded_settings` does.

        If the dataset was given as a relative path, the path is adapted to the current folder, provided that
        the dataset is still at the same place relative to the run folder.
        """
        recorded = _Recorded(**self.recorded_settings())
        settings = recorded.settings()
        if recorded.data_from_run is not None:
            data = change_folders(
                location_of(recorded.data_from_run), lambda path: (self.folder / path).resolve()
            )
            if is_present(data):
                data = change_folders(data, lambda path: Path(os.path.relpath(path)))
                return settings.model_copy(update={"data": data})
        return settings

    def recorded_settings(self) -> dict[str, Any]:
        """Return the content of settings.json.

        Raises SettingsError if there is no run, and RunError if the file is damaged.
        """
        held = self._recorded()
        if held is None:
            raise SettingsError(f"no run in {self.folder}: it has no {SETTINGS}")
        return held

    def _recorded(self) -> dict[str, Any] | None:
        """Return the content of settings.json, or None without one. Raises as `recorded_settings` does."""
        path, remedy = self.folder / SETTINGS, "restore it from a copy"
        recorded = _read_json(path, _RECORDED, remedy)
        if recorded is None:
            return None
        try:
            recorded.settings()
        except ValidationError as error:
            detail = error.errors()[0]
            if detail["type"] == "extra_forbidden":
                raise RunError(
                    f"{path} has the setting '{detail['loc'][0]}', which this version does not know: "
                    "use the version of alexnet-train that began the run"
                ) from None
            where = ".".join([SETTINGS, *map(str, detail["loc"][:1])])
            raise RunError(f"{path} is damaged ({where}: {message_of(error)}): {remedy}") from None
        return recorded.model_dump(mode="json", exclude_unset=True)

    def net(self, settings: Settings) -> NetSpec:
        """Return everything that is needed to use the net.

        It comes from net.json or, for a run of an earlier version, from the dataset that the settings name.
        Raises RunError if net.json is damaged or does not match the settings, or if that dataset cannot be
        read.
        """
        try:
            with suppress(FileNotFoundError):
                spec = NetSpec.read(self.folder)
                if spec.crop != settings.crop:
                    raise RunError(
                        f"{self.folder / NET_NAME} says crops of {spec.crop} pixels, but {SETTINGS} says "
                        f"{settings.crop}: restore both from one copy of the run"
                    )
                return spec
            return NetSpec.from_manifest(read_data(settings.data), settings.crop, settings.pixel_mean)
        except SpecError as error:
            raise RunError(str(error)) from None
        except DatasetError as error:
            raise RunError(
                f"{self.folder} is from an earlier version, has no {NET_NAME}, and needs its dataset: {error}"
            ) from None

    def record_environment(self, device: str) -> dict[str, str]:
        """Add this start to environment.json, and return its entry. device: name of the device."""
        starts = [*self.starts(), environment(device)]
        _write_json(self.folder / _ENVIRONMENT, starts)
        return starts[-1]

    def starts(self) -> list[dict[str, str]]:
        """Return the entries of environment.json, oldest first. Raises RunError if the file is damaged."""
        return _read_json(self.folder / _ENVIRONMENT, _STARTS, "delete it") or []


def _identity(settings: Settings, dataset: str, whole: bool = False) -> dict[str, Any]:
    """Return what identifies a run, as JSON values.

    dataset: its fingerprint. whole: whether to include the settings that may change.
    """
    chosen = settings.model_dump(mode="json") if whole else settings.identity()
    if whole:
        chosen["data"] = redact(chosen["data"])
    return {"dataset": dataset, **chosen}


def _read_json(path: Path, structure: TypeAdapter[T], remedy: str) -> T | None:
    """Return the content of a JSON file, or None without one. Raises RunError if the file is damaged."""
    try:
        return read_json(path, structure)
    except FileNotFoundError:
        return None
    except ContentError as error:
        raise RunError(f"{error}: {remedy}") from None


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
