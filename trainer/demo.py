"""Run the whole workflow on a small set of drawn pictures, with the commands that a user would type."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.manifest import MANIFEST_NAME
from pipeline.names import ROOT

PROGRAM = "alexnet-train"


def demo(folder: Path) -> int:
    """Draw pictures, pack them and train on them in `folder`.

    Steps whose result exists are skipped. Returns the exit code of the first command that fails.
    Otherwise, it does not return: training replaces this process, so that signals reach it directly.
    """
    pictures, shards, run = folder / "pictures", folder / "shards", folder / "run"
    preparations = {
        pictures: ["draw-pictures", "--out", pictures],
        shards / MANIFEST_NAME: ["make-shards", "--input", pictures, "--out", shards, "--size", "128"],
    }
    for result, command in preparations.items():
        if not result.exists():
            code = subprocess.run(_announced(command), check=False).returncode
            if code:
                return code
    os.execv(sys.executable, _announced(["--data", shards, "--out", run, "--recipe", "demo"]))


def _announced(command: Iterable[object]) -> list[str]:
    """Print a command as the user can type it, and return one that also works where nothing is installed."""
    arguments = list(map(str, command))
    print("$", shlex.join([_program(), *arguments]), flush=True)
    return [sys.executable, "-m", f"{ROOT}tools.command", *arguments]


def _program() -> str:
    """Return how the user can start alexnet-train: by name if it is on the PATH, otherwise by its path."""
    started = sys.argv[0]
    is_script = Path(started).name == PROGRAM and shutil.which(PROGRAM) != started
    return started if is_script else PROGRAM
