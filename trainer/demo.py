"""The whole way on a small drawn picture set, by the commands that a user would type."""

import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.manifest import NAME


def demo(folder: Path) -> int:
    """Draw, pack and train in `folder`; returns the exit code of the command that failed, or 0."""
    pictures, shards, run = folder / "pictures", folder / "shards", folder / "run"
    commands = {
        pictures / "val": ["tools.draw_pictures", "--output", pictures],
        shards / NAME: ["tools.make_shards", "--input", pictures, "--output", shards, "--size", "128"],
        None: ["trainer.cli", "--data", shards, "--out", run, "--recipe", "demo"],
    }
    for result, command in commands.items():
        if result is not None and result.exists():
            continue
        arguments = ["-m", *map(str, command)]
        print("$", shlex.join(["python", *arguments]), flush=True)
        code = subprocess.run([sys.executable, *arguments], check=False).returncode
        if code:
            return code
    return 0
