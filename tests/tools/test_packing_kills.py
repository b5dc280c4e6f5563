"""Killed at any moment, and started again until it ends: the bytes of a run that nobody killed.

PACKING_KILLS=200 pytest tests/tools/test_packing_kills.py is the long version.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import NAME
from tools.storage import UNFINISHED

REPO = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("PACKING_KILLS", "12"))
KILLS_OF_A_RUN = 6  # after which it is let end, and another begins
SEED = 2012
# Large pictures in small shards: most of the time goes by in packing, and much of that in its seams.
SETTINGS = ("--size", "448", "--shard-samples", "4", "--workers", "2")


def start(source: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(output)]
    return subprocess.Popen(
        [*command, *SETTINGS],
        cwd=REPO,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(process: subprocess.Popen, seconds: float | None = None) -> bool:
    """Whether it ends by itself; if not by then, it is killed, and its workers with it."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    # The run before may have been killed when all it had left to do was to leave.
    assert process.returncode == 0 or "already holds a dataset" in errors, errors
    return True


def finished_files(output: Path) -> dict[str, bytes]:
    """Those under final names."""
    if not output.exists():
        return {}
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != UNFINISHED}


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * KILLS)
def test_killed_runs_end_with_the_bytes_of_one_that_was_not(pictures, tmp_path):
    begin = time.monotonic()
    assert ends(start(pictures, tmp_path / "whole"))
    seconds = time.monotonic() - begin
    whole = finished_files(tmp_path / "whole")
    rng = np.random.default_rng(SEED)
    kills = runs = resumed = 0
    while kills < KILLS:
        output, runs = tmp_path / f"killed-{runs}", runs + 1
        for _ in range(min(KILLS_OF_A_RUN, KILLS - kills)):
            if ends(start(pictures, output), rng.uniform(0, seconds)):
                break
            kills += 1
            left = finished_files(output)
            assert {name: content for name, content in left.items() if whole[name] != content} == {}
            assert NAME not in left or left == whole
            resumed += 0 < len(left) < len(whole)
        else:
            assert ends(start(pictures, output))
        assert finished_files(output) == whole
        assert not (output / UNFINISHED).exists()
    print(f"{kills} kills in {runs} runs, {resumed} of them with some shards done")
    assert resumed  # the kills were not all before the first shard or after the last
