"""Run the whole workflow on a small set of drawn pictures, with the commands that a user would type."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.manifest import MANIFEST_NAME


def demo(folder: Path) -> int:
    """Draw pictures, pack them and train on them in `folder`.

    Steps whose result exists are skipped. Returns the exit code of the first command that fails.
    Otherwise, it does not return: training replaces this process, so that signals reach it directly.
    """
    pictures, shards, run = folder / "pictures", folder / "shards", folder / "run"
    preparations = {
        pictures / "val": ["tools.draw_pictures", "--out", pictures],
        shards / MANIFEST_NAME: [
            *("tools.make_shards", "--input", pictures, "--out", shards, "--size", "128")
        ],
    }
    for result, command in preparations.items():
        if not result.exists():
            code = subprocess.run(_announced(command), check=False).returncode
            if code:
                return code
    training = _announced(["trainer.cli", "--data", shards, "--out", run, "--recipe", "demo"])
    os.execv(sys.executable, training)


def _announced(command: Iterable[object]) -> list[str]:
    """Print a command as a user would type it, and return it in full."""
    arguments = ["-m", *map(str, command)]
    print("$", shlex.join(["python", *arguments]), flush=True)
    return [sys.executable, *arguments]
