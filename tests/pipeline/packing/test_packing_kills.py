"""Killed at any event, and started again until it ends: the bytes of a run that nobody killed.

What a kill leaves on the disk is decided by the events before it, such as the reading of a picture or the
renaming of a shard, so kills lie between those. The long version is

    PACKING_KILLS=200 pytest tests/pipeline/packing/test_packing_kills.py
"""

import os
import re
import signal
import subprocess
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.storage import STATE_FOLDER
from tests.events import KILL_ALL, at_event, events
from tests.trees import contents

KILLS = int(os.environ.get("PACKING_KILLS", "12"))
KILLS_OF_A_RUN = 4  # after which it is let end, and another begins
SEED = 2012
SHARDS = 8  # 60 pictures to train on, and 20 to validate on
SETTINGS = ("--size", "64", "--shard-samples", "10", "--workers", "2")


def ends(done: subprocess.CompletedProcess) -> bool:
    """Whether the command ended by itself; else it was killed, and its workers with it."""
    if done.returncode == -signal.SIGKILL:
        return False
    # The run before may have been killed when all it had left to do was to leave.
    assert done.returncode == 0 or "already contains a dataset" in done.stderr, done.stderr
    return True


def finished_files(output: Path) -> dict[str, bytes]:
    """Those under final names."""
    files = contents(output).items()
    return {name: content for name, content in files if Path(name).parts[0] != STATE_FOLDER}


def finished_shards(log: list[str], output: Path) -> list[int]:
    """The numbers of the events at which shards got their final names, from 1."""
    renamed = re.compile(rf"os\.rename .* {re.escape(str(output))}/[^/]*\.tar")
    return [number for number, event in enumerate(log, 1) if renamed.fullmatch(event)]


@pytest.mark.slow
@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_runs_end_with_the_bytes_of_one_that_was_not(make_shards, pictures, tmp_path):
    def packing(output: Path, environment: dict[str, str]) -> bool:
        return ends(make_shards(pictures, output, *SETTINGS, **environment))

    logged = at_event(0, "pass", tmp_path / "log", pictures, tmp_path / "whole")
    assert packing(tmp_path / "whole", logged)
    whole, log = finished_files(tmp_path / "whole"), events(tmp_path / "log")
    first, *_, last = finished_shards(log, tmp_path / "whole")
    assert len(finished_shards(log, tmp_path / "whole")) == SHARDS
    rng = np.random.default_rng(SEED)
    # The first kill of a run by turns: halfway from the first shard to the last, where two workers have two
    # shards under way and others behind them; before the first; and after the last.
    phases = cycle([((first + last) // 2,) * 2, (1, first), (last + 1, len(log))])
    kills = runs = amid = 0
    while kills < KILLS:
        output, runs, phase = tmp_path / f"killed-{runs}", runs + 1, next(phases)
        for number in range(min(KILLS_OF_A_RUN, KILLS - kills)):
            # A run that is continued may be through before the event comes.
            low, high = (1, len(log)) if number else phase
            event = int(rng.integers(low, high, endpoint=True))
            kill = at_event(event, KILL_ALL, tmp_path / f"kill-{runs}-{number}", pictures, output)
            if packing(output, kill):
                break
            kills += 1
            left = finished_files(output)
            assert {name: content for name, content in left.items() if whole[name] != content} == {}
            assert MANIFEST_NAME not in left or left == whole
            amid += 0 < len(left) < len(whole)
        else:
            assert packing(output, {})
        assert finished_files(output) == whole
        assert not (output / STATE_FOLDER).exists()
    print(f"{kills} kills in {runs} runs, {amid} of them with some shards done")
    assert amid  # at the least those halfway
