"""The packing command, run as people run it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., subprocess.CompletedProcess]:
    """make_shards(input, output, *arguments, **environment), with one worker unless told."""

    def run(source: Path, output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(output)]
        return subprocess.run(
            [*command, "--workers", "1", *arguments],
            cwd=REPO,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
