"""Two processes train like one, whoever starts them and whatever ends one of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.test_train import command, exact, main, rows, run, wait_for

WITHOUT_DROPOUT = ["--dropout", "off", "--epochs", "2"]  # which depends on the rank


def processes_of(parent: int) -> dict[str, int]:
    """The children of a launcher by their rank."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        ranks = [text[5:].decode() for text in variables if text.startswith(b"RANK=")]
        found |= {rank: int(status.parent.name) for rank in ranks}
    return found


@pytest.fixture(scope="module")
def two(packed, tmp_path_factory) -> Path:
    """A run of two processes that torchrun started and nothing interrupted."""
    out = tmp_path_factory.mktemp("two") / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(*torchrun, *command(packed, out, *WITHOUT_DROPOUT))
    return out


def test_two_processes_train_like_one(packed, two, tmp_path, monkeypatch):
    """Same images in the same steps and the same mean gradient; only the order of sums differs."""
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, *WITHOUT_DROPOUT)) == 0
    one_loss, two_loss = ([float(row["loss"]) for row in rows(at / "metrics.csv")] for at in (out, two))
    assert one_loss == pytest.approx(two_loss, rel=1e-3)
    assert [row["images"] for row in rows(two / "evaluations.csv")] == ["20", "20"]


def test_two_processes_of_which_one_is_killed_and_both_are_stopped_give_the_same_losses(
    packed, two, tmp_path
):
    out = tmp_path / "run"
    arguments = command(packed, out, *WITHOUT_DROPOUT, "--processes", "2", "--checkpoint-steps", "2")
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(3, out, process)
    os.kill(processes_of(process.pid)["1"], signal.SIGKILL)
    wait_for(7, out, process)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=120)
    done = int(rows(out / "metrics.csv")[-1]["step"])
    assert process.returncode == 143
    assert f"SIGTERM: saved after step {done}".encode() in output
    assert error.decode().splitlines() == [
        "alexnet-train: the process of rank 1 was ended by SIGKILL",
        "alexnet-train: all start again after the last checkpoint, restart 1 of 3",
    ]
    assert f"after step {done}" in run(*arguments)
    assert exact(out / "metrics.csv") == exact(two / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(two / "evaluations.csv")
