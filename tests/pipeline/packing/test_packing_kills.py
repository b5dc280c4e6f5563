"""A packing that is killed at any event, and repeated until it ends, gives the bytes of an undisturbed one.

What a kill leaves on the disk depends on the events before it, such as reading a picture or renaming a shard,
so kills happen at events. The long version is

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
KILLS_PER_RUN = 4  # after which the run may end, and another begins
SEED = 2012
SHARDS = 8  # for 60 training and 20 validation pictures
SETTINGS = ("--size", "64", "--shard-samples", "10", "--workers", "2")


def ends(done: subprocess.CompletedProcess) -> bool:
    """Return whether the command ended by itself; otherwise it was killed with its workers."""
    if done.returncode == -signal.SIGKILL:
        return False
    # The run before may have been killed when its dataset was complete.
    assert done.returncode == 0 or "already contains a dataset" in done.stderr, done.stderr
    return True


def finished_files(output: Path) -> dict[str, bytes]:
    """Return the files that have their final names."""
    return {
        name: content for name, content in contents(output).items() if Path(name).parts[0] != STATE_FOLDER
    }


def finished_shards(log: list[str], output: Path) -> list[int]:
    """Return the numbers, from 1, of the events at which shards got their final names."""
    renamed = re.compile(rf"os\.rename .* {re.escape(str(output))}/[^/]*\.tar")
    return [number for number, event in enumerate(log, 1) if renamed.fullmatch(event)]


@pytest.mark.slow
@pytest.mark.timeout(300 + 30 * KILLS)
def test_killed_runs_give_the_bytes_of_an_undisturbed_run(make_shards, pictures, tmp_path):
    def packing(output: Path, environment: dict[str, str]) -> bool:
        return ends(make_shards(pictures, output, *SETTINGS, code=None, **environment))

    logged = at_event(0, "pass", tmp_path / "log", pictures, tmp_path / "whole")
    assert packing(tmp_path / "whole", logged)
    whole, log = finished_files(tmp_path / "whole"), events(tmp_path / "log")
    first, *_, last = finished_shards(log, tmp_path / "whole")
    assert len(finished_shards(log, tmp_path / "whole")) == SHARDS
    rng = np.random.default_rng(SEED)
    # The first kill of a run is, in turn, halfway between the first shard and the last, where two workers
    # have finished some shards and begun others; before the first; and after the last.
    phases = cycle([((first + last) // 2,) * 2, (1, first), (last + 1, len(log))])
    kills = runs = amid = 0
    while kills < KILLS:
        output, runs, phase = tmp_path / f"killed-{runs}", runs + 1, next(phases)
        for number in range(min(KILLS_PER_RUN, KILLS - kills)):
            # A continued run may end before the event.
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
    assert amid  # at least those halfway
