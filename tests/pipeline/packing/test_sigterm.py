"""SIGTERM, which `docker stop` sends to the first process of a container, where it has no default action.

Also SIGHUP, which a terminal that is closed sends to all processes of a command.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.manifest import MANIFEST_NAME
from pipeline.packing.storage import STATE_FOLDER
from tests.helpers import DEADLINE_SECONDS, REPO, has_ended, wait_until

AS_FIRST = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def packing(source: Path, output: Path, size: int) -> list[str]:
    command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--out", str(output)]
    return [*command, "--size", str(size), "--shard-samples", "4", "--workers", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "is_first"), [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGHUP, False)]
)
def test_a_signal_ends_packing_at_once_and_the_same_command_continues(pictures, tmp_path, number, is_first):
    if is_first and (
        not shutil.which("unshare") or subprocess.run([*AS_FIRST, "true"], check=False).returncode
    ):
        pytest.skip("this system lets no process be the first of a namespace")
    command = packing(pictures, tmp_path / "out", 1024)
    process = subprocess.Popen(
        AS_FIRST * is_first + command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: list((tmp_path / "out" / STATE_FOLDER).glob("*.result.json")), process)
    packer = psutil.Process(process.pid)
    packer = packer.children()[0] if is_first else packer
    workers = packer.children()
    if number == signal.SIGHUP:
        os.killpg(packer.pid, number)
    else:
        packer.terminate()
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, errors) == (128 + number, "")
    wait_until(lambda: all(map(has_ended, workers)))
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert subprocess.run(command, cwd=REPO, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "out" / MANIFEST_NAME).exists()
