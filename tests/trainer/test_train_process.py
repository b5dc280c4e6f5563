"""The command as a separate process: killed, asked to stop and monitored."""

import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers import command, exact, free_port, rows, run, signalled, wait_until

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_twice_has_the_losses_of_an_uninterrupted_one(packed, tmp_path, monkeypatch):
    """Use several threads, as runs outside these tests do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(*command(packed, whole))
    arguments = command(packed, out, "--checkpoint-steps", "2")
    for steps in (4, 9):
        assert signalled("SIGKILL", steps, arguments).returncode == -signal.SIGKILL
        assert len(rows(out / "metrics.csv")) == steps
    assert "continuing" in run(*arguments)
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_continues(packed, whole, tmp_path, name, code):
    out = tmp_path / "run"
    stopped = signalled(name, 7, command(packed, out))
    assert stopped.returncode == code
    newest = max(path.name for path in (out / "checkpoints").glob("step-*"))
    done = int(rows(out / "metrics.csv")[-1]["step"])
    assert done == 8  # the current step is finished
    assert newest == f"step-{done:09d}.pt"
    assert f"{name}: saved after step {done}" in stopped.stdout
    assert f"after step {done}" in run(*command(packed, out))
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


@pytest.mark.parametrize(
    ("redirection", "processes"), [("| true", "1"), (">/dev/full 2>&1", "2"), ("<&- >&- 2>&-", "1")]
)
def test_a_log_that_is_gone_changes_nothing(packed, whole, tmp_path, redirection, processes):
    out = tmp_path / "run"
    arguments = [sys.executable, *command(packed, out, "--processes", processes)]
    shell = ["bash", "-c", f'set -o pipefail; "$0" "$@" {redirection}', *arguments]
    assert subprocess.run(shell, check=False, timeout=300).returncode == 0
    assert (out / "report.md").exists()
    assert [row["step"] for row in rows(out / "metrics.csv")] == [str(step) for step in range(1, 16)]
    if processes == "1":
        assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert (out / "checkpoints/step-000000015.pt").exists()


def test_metrics_are_served_while_it_trains(packed, tmp_path):
    port = free_port()
    arguments = command(packed, tmp_path / "run", "--epochs", "10000", "--calibrate", "--port", str(port))
    process = subprocess.Popen([sys.executable, *arguments])
    page = ""

    def has_evaluated() -> bool:
        nonlocal page
        with suppress(OSError):  # the server has not started yet
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        return 'alexnet_eval_error_ratio{k="1",protocol="centre"}' in page

    try:
        wait_until(has_evaluated, process)
        health = urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60).read()
    finally:
        process.kill()
        process.wait()
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    steps = float(values["alexnet_step"])
    assert steps >= 5
    images = float(values['alexnet_images_total{phase="train"}'])
    assert images >= 12 * 5  # the page is not of one moment: a step may end between two of its lines
    assert images % 12 == 0
    assert float(values['alexnet_loss{phase="train"}']) > 0
    for path in ("loader", "model"):
        assert float(values[f'alexnet_ceiling_images_per_second{{path="{path}"}}']) > 0
    assert health == b"ok\n"


def test_samples_that_cannot_be_decoded_are_left_out_up_to_a_limit(packed, tmp_path):
    data = Path(shutil.copytree(packed, tmp_path / "data"))
    shard = data / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    offset = content.index(b"\xff\xd8\xff", 2**16)  # beyond what opening the file reads
    content[offset : offset + 200] = bytes(200)
    shard.write_bytes(content)
    output = run(*command(data, tmp_path / "run"))
    assert f"left out: the sample in {shard} at byte {offset}" in output
    assert [int(row["step"]) for row in rows(tmp_path / "run/evaluations.csv")] == [5, 10, 15]
    # One of two processes encounters it. Both stop at the next log line, and the first saves.
    strict = ["--max-bad-samples", "0", "--processes", "2", "--log-every", "3"]
    arguments = [sys.executable, *command(data, tmp_path / "strict"), *strict]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    steps = int(rows(tmp_path / "strict/metrics.csv")[-1]["step"])
    assert f"damaged samples: saved after step {steps}" in done.stdout
    assert (tmp_path / f"strict/checkpoints/step-{steps:09d}.pt").is_file()
    assert done.stderr.startswith(
        "alexnet-train: more than 0 samples are damaged, the last of them the sample in "
        f"{shard} at byte {offset} does not begin like a JPEG: copy the shard again"
    )


def test_evaluate_reproduces_the_final_error_of_training(packed, whole):
    last = rows(whole / "evaluations.csv")[-1]
    centre = run("-m", "trainer.cli", "evaluate", str(whole), "--data", str(packed))
    assert f"top-1 error {float(last['top1_error']):.2%}" in centre
    assert "over 20 images" in centre
    assert "ten crops" in run("-m", "trainer.cli", "evaluate", str(whole), "--crops", "10")
