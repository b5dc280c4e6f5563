"""The run folder: what belongs to one run, and the refusal to mix two.

settings.json      the settings, the dataset's fingerprint, and what `auto` was when the run began
net.json           what one has to know to use the net: pipeline/spec.py
environment.json   versions, commit and machine of each start
metrics.csv        a row each log interval
evaluations.csv    a row each evaluation
checkpoints/       see trainer/checkpoint.py
report.md, *.png   at the end
.lock              locked by the process that trains, and by nobody once it has ended, however it did
"""

import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.files import held_open, sync_folder, whole_file
from pipeline.manifest import DatasetError, Manifest, read_manifest
from pipeline.retry import read_patiently
from pipeline.spec import NAME as _NET
from pipeline.spec import NetSpec, SpecError
from pipeline.versions import installed_version
from trainer.settings import Resolved, Settings, SettingsError
from trainer.table import Table

REPORT = "report.md"
_SETTINGS, _ENVIRONMENT, _LOCK = "settings.json", "environment.json", ".lock"
_RESOLVED = "resolved"  # in settings.json: what `auto` was when the run began
_ONCE = {"convolutions": "grouped"}  # what was not recorded while there was one
# What is left of a start that was killed early.
_BEFORE_SETTINGS = {_LOCK, f".{_SETTINGS}.partial", _NET, f".{_NET}.partial"}
_COMMIT = Path(__file__).with_name("COMMIT")  # docker/Dockerfile writes it
_HELD = {errno.EAGAIN, errno.EACCES}  # by another process; a server of SMB says the latter
_PACKAGES = ("alexnet-train", "torch", "nvidia-dali-cuda130", "numpy")


class RunError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


class LostError(RunError):
    """A run that may go on when started again: another of its processes is gone."""


class _Recorded(BaseModel):
    """What settings.json must be, whatever settings it has."""

    model_config = ConfigDict(extra="allow")

    resolved: Resolved = None  # type: ignore[assignment]  # it may be missing, not null


class Run:
    """A run folder, new or to be continued."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = Table(folder / "metrics.csv")
        self.evaluations = Table(folder / "evaluations.csv")
        self.checkpoints = folder / "checkpoints"

    def begin(self, settings: Settings, manifest: Manifest) -> TextIO:
        """Make the folder, or check that what it holds is this run.

        Returns the lock: no other process can begin until it is closed or this one has ended. Raises
        SettingsError where the folder holds another run, naming what differs, or foreign files, and
        RunError where it is being trained.
        """
        fresh = self.is_new(settings, manifest)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(self.folder)
        if fresh and self.is_new(settings, manifest):  # it was another's until now
            NetSpec.of(manifest, settings.crop).write(self.folder)
            _write_json(self.folder / _SETTINGS, _identity(settings, manifest.fingerprint, whole=True))
        return lock

    def adopt(self, settings: Settings, net: NetSpec, origin: str) -> None:
        """Make a run of weights that were trained elsewhere, but for their checkpoint. It can be evaluated
        and used; no training goes on in it, as the origin in the place of the dataset differs from any.

        Raises SettingsError if there is anything in the folder.
        """
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise SettingsError(f"{self.folder} is not empty: choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        net.write(self.folder)
        _write_json(self.folder / _SETTINGS, _identity(settings, origin, whole=True))

    def is_new(self, settings: Settings, manifest: Manifest) -> bool:
        """Whether no run has begun here; one that has must be this one."""
        identity = _identity(settings, manifest.fingerprint)
        recorded = self._recorded()
        if recorded is not None:
            # Of a run that an earlier version began: what is not there was not to be chosen then.
            held = json.loads(Settings.model_construct().model_dump_json()) | _ONCE | recorded
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
                    "choose another --out, or give that run's settings to continue it"
                )
            return False
        if self.folder.is_dir() and {held.name for held in self.folder.iterdir()} - _BEFORE_SETTINGS:
            raise SettingsError(
                f"{self.folder} is not empty and has no {_SETTINGS}, so it is not a run: choose another --out"
            )
        return True

    def settle(self, settings: Settings, resolved: Mapping[str, str]) -> None:
        """Record what `auto` means here when the run begins, and hold each later start to that.

        resolved: the `device`, cpu or cuda, and the `precision`. The device may change where the settings
        name it. Raises SettingsError where a continuation would change anything else unasked.
        """
        held = self.recorded_settings()
        began = held.get(_RESOLVED)
        if began is None:  # new, or of an earlier version, which did not record it
            _write_json(self.folder / _SETTINGS, {**held, _RESOLVED: dict(resolved)})
            return
        changed = [name for name in resolved if resolved[name] != began[name]]
        if settings.device != "auto" and "device" in changed:
            changed.remove("device")
        if changed:
            there = " and ".join(f"{name} {began[name]}" for name in changed)
            here = " and ".join(resolved[name] for name in changed)
            keep = {"precision": began["precision"], "device": resolved["device"]}
            flags = " ".join(f"--{name} {keep[name]}" for name in changed)
            raise SettingsError(
                f"{self.folder} began with {there}, and auto is {here} on this machine: "
                f"give {flags} to continue it here, or choose another --out"
            )

    def keep_form(self, choose: Callable[[], str]) -> str:
        """The form of the net's convolutions that was recorded when the run began, or that `choose` finds now
        that it begins. Raises as `recorded_settings` does."""
        held = self.recorded_settings()
        began = held.get(_RESOLVED, {}) if "convolutions" in held else _ONCE
        if "convolutions" in began:
            return began["convolutions"]
        form = choose()
        _write_json(self.folder / _SETTINGS, {**held, _RESOLVED: {**began, "convolutions": form}})
        return form

    @property
    def is_finished(self) -> bool:
        """Whether its last step was done, after which the report is written."""
        return (self.folder / REPORT).exists()

    def sync(self) -> None:
        """Have all rows on the disk, as a checkpoint after them shall be. Raises OSError."""
        self.metrics.sync()
        self.evaluations.sync()
        sync_folder(self.folder)

    def settings(self) -> Settings:
        """The settings that the run was begun with. Raises as `recorded_settings` does."""
        held = self.recorded_settings()
        return Settings.model_validate(
            {name: value for name, value in held.items() if name not in ("dataset", _RESOLVED)}
        )

    def recorded_settings(self) -> dict[str, Any]:
        """The content of settings.json. Raises SettingsError if there is no run, RunError if it is damaged,
        and OSError."""
        held = self._recorded()
        if held is None:
            raise SettingsError(f"no run in {self.folder}: it has no {_SETTINGS}")
        return held

    def _recorded(self) -> dict[str, Any] | None:
        """The content of settings.json, or None without one. Raises as `recorded_settings` does."""
        path, remedy = self.folder / _SETTINGS, "put a copy in its place"
        held = _read_json(path, remedy)
        if held is None:
            return None
        try:
            _Recorded.model_validate(held)
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join([_SETTINGS, *map(str, detail["loc"])])
            what = "no JSON object" if detail["type"] == "model_type" else detail["msg"]
            raise RunError(f"{path} is damaged ({where}: {what}): {remedy}") from None
        return held

    def net(self, settings: Settings) -> NetSpec:
        """What one has to know to use the net. A run of an earlier version has it from the dataset of the
        settings. Raises RunError if that is gone, or the file is damaged."""
        try:
            with suppress(FileNotFoundError):
                return NetSpec.read(self.folder)
            return NetSpec.of(read_manifest(settings.data), settings.crop)
        except SpecError as error:
            raise RunError(f"{error}. Delete it, and it is made again from the dataset") from None
        except DatasetError as error:
            raise RunError(
                f"{self.folder} is of an earlier version, with no {_NET}, and needs its dataset: {error}"
            ) from None

    def record_environment(self, device: str) -> dict[str, str]:
        """Add this start to environment.json; returns what was added."""
        starts = [*self.starts(), environment(device)]
        _write_json(self.folder / _ENVIRONMENT, starts)
        return starts[-1]

    def starts(self) -> list[dict[str, str]]:
        """What was recorded of each start, the latest last. Raises OSError, or RunError if it is damaged."""
        return _read_json(self.folder / _ENVIRONMENT, "delete it") or []


def _identity(settings: Settings, dataset: str, whole: bool = False) -> dict[str, Any]:
    """What makes a run this run; dataset: its fingerprint; whole: and all that may change."""
    chosen = json.loads(settings.model_dump_json()) if whole else settings.identity()
    return {"dataset": dataset, **chosen}


def _locked(folder: Path) -> TextIO:
    """The folder's lock file, locked until it is closed. Raises RunError if another process has it."""
    lock = open(folder / _LOCK, "a+")  # noqa: SIM115 – the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            with held_open(lock):
                owner = _owner(lock)
            raise RunError(
                f"{folder} is being trained by {owner}: wait for it, end it, or choose another --out"
            ) from None
        # Some network file systems have no locks.
        print(
            f"alexnet-train: {folder} cannot be locked ({error.strerror}): see that nothing else trains it",
            file=sys.stderr,
        )
    with suppress(OSError):  # who it is, is for people alone
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _owner(lock: TextIO) -> str:
    """Who has the lock, as it says of itself."""
    with suppress(OSError):  # where what is locked cannot be read, either
        lock.seek(0)
        return lock.read().strip() or "another process"
    return "another process"


def environment(device: str) -> dict[str, str]:
    """Versions, commit and machine, for a run's record and a measurement's."""
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "commit": _git_commit(),
        **{package: installed_version(package) for package in _PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git_commit() -> str:
    """The commit of this code, with a mark if it was changed; `unknown` outside a clone and an image."""
    if _COMMIT.exists():
        return _COMMIT.read_text().strip()
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _read_json(path: Path, remedy: str) -> Any:
    """The content, or None where there is no such file. Raises OSError, or RunError if it is damaged."""
    try:
        return json.loads(read_patiently(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): {remedy}") from None


def _write_json(path: Path, content: object) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
