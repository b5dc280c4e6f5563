"""Two processes train like one, even if one is killed or both are stopped and continued."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import (
    DEADLINE_SECONDS,
    command,
    exact,
    free_port,
    main,
    ranks_of,
    rows,
    run,
    wait_for_rows,
    wait_until,
)

pytestmark = pytest.mark.slow

# Dropout depends on the rank. With 20 epochs a run cannot end between a check and a signal.
WITHOUT_DROPOUT = ["--dropout", "off", "--epochs", "20"]
CLOSE = {"fp32": 1e-3, "bf16": 2**-6}  # relative difference of losses; bf16 rounds by up to 2**-9
LARS = ["--optimizer", "lars", "--trust-coefficient", "0.1", "--learning-rate", "0.05"]


def torchrun(*arguments: str) -> str:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)


@pytest.mark.parametrize(("precision", "more"), [("fp32", []), ("bf16", []), ("fp32", LARS)])
def test_two_processes_train_like_one(precision, more, packed, tmp_path, monkeypatch):
    """They see the same images in the same steps and have the same mean gradient, up to the order of sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*WITHOUT_DROPOUT, "--epochs", "2", "--precision", precision, *more]
    torchrun(*command(packed, two, *settings))
    assert main(monkeypatch, command(packed, one, *settings)) == 0
    one_loss, two_loss = ([float(row["loss"]) for row in rows(out / "metrics.csv")] for out in (one, two))
    assert len(one_loss) == 10
    assert one_loss == pytest.approx(two_loss, rel=CLOSE[precision])
    assert [row["images"] for row in rows(two / "evaluations.csv")] == ["20", "20"]


def test_killing_one_of_two_processes_and_stopping_both_does_not_change_the_losses(packed, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    torchrun(*command(packed, whole, *WITHOUT_DROPOUT))
    arguments = command(packed, out, *WITHOUT_DROPOUT, "--processes", "2", "--checkpoint-steps", "2")
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_rows(3, out, process)
    lost = ranks_of(process.pid)["1"]
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: ranks_of(process.pid).get("1") not in (None, lost), process)
    wait_for_rows(len(rows(out / "metrics.csv")) + 4, out, process)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=DEADLINE_SECONDS)
    done = int(rows(out / "metrics.csv")[-1]["step"])
    assert process.returncode == 143
    assert f"SIGTERM: saved after step {done}".encode() in output
    assert error.decode().splitlines() == [
        "alexnet-train: the process of rank 1 was ended by SIGKILL",
        "alexnet-train: restarting all processes from the last checkpoint, restart 1 of 3",
    ]
    assert f"after step {done}" in run(*arguments)
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def test_processes_that_find_different_checkpoints_end_in_one_line(packed, whole, tmp_path):
    """As on two hosts that do not see the same --out: the second would begin with other weights."""
    first, second = Path(shutil.copytree(whole, tmp_path / "first")), tmp_path / "second"
    (first / "report.md").unlink()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, *command(packed, out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate((first, second))
    ]
    for process in processes:
        _, error = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 1
        assert "the processes found different checkpoints: continuing " in error
        assert "after step 15, epoch 3.00; but another one is starting without one. All hosts" in error
        assert "Traceback" not in error
