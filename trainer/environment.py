"""Describe what measurements and losses depend on besides the settings: versions, commit and hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__

_COMMIT = Path(__file__).with_name("COMMIT")  # written by docker/Dockerfile
_PACKAGES = ("torch", "nvidia-dali-cuda130", "numpy")


def environment(device: str) -> dict[str, str]:
    """Return versions, commit and hardware, to record with a run or a measurement.

    device: name of the device.
    """
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "commit": _git_commit(),
        "alexnet-train": __version__,
        **{package: _installed_version(package) for package in _PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git_commit() -> str:
    """Return the commit, with -dirty if the code was modified; `unknown` outside git and the image."""
    if _COMMIT.exists():
        return _COMMIT.read_text().strip()
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _installed_version(package: str) -> str:
    """Return a package's version, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
