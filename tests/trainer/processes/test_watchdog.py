"""A process that hangs is ended and reports where; a rank that hangs also ends the others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import DEADLINE_SECONDS, command, ranks_of, wait_for_rows, wait_until
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.processes.watchdog import EXIT_STALLED, START_UP_SECONDS, allowed_seconds

HANGS = """
import ctypes, time
from types import SimpleNamespace
from trainer.processes import watchdog

watchdog.GRACE_SECONDS = 0.5
begun = time.monotonic()
stalled_seconds = lambda: time.monotonic() - begun
metrics = SimpleNamespace(history=[1], current_activity="input", stalled_seconds=stalled_seconds)
watchdog.Watchdog(metrics, 0.5, rank=3)

def where_it_hangs():
    {hang}

where_it_hangs()
"""


def hang(statement: str) -> tuple[int, str]:
    script = HANGS.format(hang=statement)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=DEADLINE_SECONDS
    )
    return done.returncode, done.stderr


def test_a_hang_ends_the_process_with_its_own_exit_code_and_all_stacks():
    code, error = hang("time.sleep(600)")
    assert code == EXIT_STALLED
    line, *stacks = error.splitlines()
    assert line.startswith("alexnet-train: rank 3 has made no progress for ")
    assert "during input" in line
    assert any("in where_it_hangs" in frame for frame in stacks)


def test_a_hang_in_c_that_blocks_all_python_code_also_ends_the_process():
    code, error = hang("ctypes.PyDLL(None).sleep(600)")  # PyDLL holds the interpreter's lock
    assert code == 1
    assert "in where_it_hangs" in error


def test_the_first_interval_is_allowed_more_time():
    metrics = Metrics()
    assert allowed_seconds(metrics, 60.0) == START_UP_SECONDS
    assert allowed_seconds(metrics, 2 * START_UP_SECONDS) == 2 * START_UP_SECONDS
    metrics.record_interval(Interval(1, 1, 1.0, 0.0, 1.0, 0.0, 1.0, 1), 0.01, 1.0, torch.device("cpu"))
    assert allowed_seconds(metrics, 60.0) == 60.0
    assert allowed_seconds(metrics, 0.0) == float("inf")


@pytest.mark.slow
def test_a_rank_whose_peers_never_join_ends(packed, tmp_path):
    script = "from trainer import cli; from trainer.processes import watchdog\n"
    script += "watchdog.START_UP_SECONDS = 1.0; cli.main()"
    world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    _, _, *arguments = command(packed, tmp_path / "run", "--stall-seconds", "1")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **world},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == EXIT_STALLED
    assert "rank 1 has made no progress" in done.stderr
    assert "in join" in done.stderr


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_whole_run(packed, tmp_path):
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, *command(packed, out, "--epochs", "100000", "--stall-seconds", "10")]
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for_rows(3, out, process)
    ranks = ranks_of(process.pid)
    os.kill(ranks["1"], signal.SIGSTOP)
    wait_until(lambda: not is_alive(ranks["0"]))
    os.kill(ranks["1"], signal.SIGKILL)  # as torchrun would after 30 s
    _, error = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode != 0
    assert b"rank 0 has made no progress" in error
    assert b"in _train" in error  # in the step, or in the logging after it
    assert not any(map(is_alive, ranks.values()))
