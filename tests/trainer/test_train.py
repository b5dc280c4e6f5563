"""The loop as the command runs it: resume after SIGKILL, many processes, metrics meanwhile, report."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from pipeline.loader import evaluation_loader, train_loader
from pipeline.manifest import DatasetError
from trainer import checkpoint, cli

# 60 training images: 5 steps an epoch. The smallest net, and a row in metrics.csv for each step.
TINY = ["--recipe", "demo", "--crop", "67", "--batch", "12", "--epochs", "3", "--log-every", "1"]
EXACT = ("step", "epoch", "loss", "error", "learning_rate")


def command(data: Path, out: Path, *arguments: str) -> list[str]:
    return ["-m", "trainer.cli", "--data", str(data), "--out", str(out), "--port", "0", *TINY, *arguments]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def exact(path: Path) -> list[tuple[str, ...]]:
    """What must be equal bit for bit, as the text that was written."""
    return [tuple(row[name] for name in EXACT) for row in rows(path)]


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*command(packed, out, "--checkpoint-steps", "2"))
    return out


def test_a_run_that_is_killed_twice_gives_the_losses_of_one_that_is_not(packed, whole, tmp_path):
    out = tmp_path / "run"
    for steps in (4, 9):
        process = subprocess.Popen([sys.executable, *command(packed, out, "--checkpoint-steps", "2")])
        wait_for(steps, out, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    output = run(*command(packed, out, "--checkpoint-steps", "2"))
    assert "continuing" in output
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def wait_for(steps: int, out: Path, process: subprocess.Popen) -> None:
    """Until so many rows are there, or the process has ended."""
    while len(rows(out / "metrics.csv")) < steps and process.poll() is None:
        time.sleep(0.01)


def terminate_after(steps: int, arguments: list[str], out: Path) -> tuple[int, str]:
    """Send SIGTERM once so many rows are there; returns the exit code and what was printed."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    wait_for(steps, out, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_sigterm_saves_what_was_done_and_the_same_command_goes_on(packed, whole, tmp_path):
    out = tmp_path / "run"
    code, output = terminate_after(7, command(packed, out), out)
    assert code == 143
    (newest,) = sorted(path.name for path in (out / "checkpoints").iterdir())[-1:]
    done = int(rows(out / "metrics.csv")[-1]["step"])
    assert newest == f"step-{done:09d}.pt"
    assert f"SIGTERM: saved after step {done}" in output
    assert f"after step {done}" in run(*command(packed, out))
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def test_an_evaluation_that_is_interrupted_is_done_again(packed, whole, tmp_path, monkeypatch):
    """SIGTERM comes with the first batch of the second epoch's evaluation, and of the last one's."""
    out = tmp_path / "run"
    for epochs in (1, 2):

        def interrupted(*arguments, epochs=epochs, **options):
            for batch in evaluation_loader(*arguments, **options):
                if len(rows(out / "evaluations.csv")) == epochs:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr("trainer.train.evaluation_loader", interrupted)
        assert main(monkeypatch, command(packed, out)) == 143
        assert len(rows(out / "evaluations.csv")) == epochs
    run(*command(packed, out))
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def main(monkeypatch, arguments: list[str]) -> int:
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", arguments[1:])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_images_that_run_out_end_a_run_with_a_checkpoint_of_the_last_step(
    packed, whole, tmp_path, monkeypatch, capsys
):
    def broken(*arguments, **options):
        yield from islice(train_loader(*arguments, **options), 7)
        raise DatasetError("too many samples cannot be decoded")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("trainer.train.train_loader", broken)
        assert main(patch, command(packed, out)) == 1
    assert capsys.readouterr().err == "alexnet-train: too many samples cannot be decoded\n"
    assert main(monkeypatch, command(packed, out)) == 0
    assert f"continuing {out} after step 7" in capsys.readouterr().out
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_training_goes_on_while_the_disk_is_full_and_saves_as_soon_as_it_can(
    packed, whole, tmp_path, monkeypatch, capsys
):
    write, saved = checkpoint.write, []

    def full_at_first(folder, step, *arguments):
        saved.append(step)
        if step < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, step, *arguments)

    out = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "write", full_at_first)
    monkeypatch.setattr("trainer.saver.RETRY_SECONDS", 0.0)
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "3", "--keep-checkpoints", "9")) == 0
    output = capsys.readouterr().out
    assert output.count("cannot be written: No space left on device: training goes on") == 1
    assert saved[0] == 3
    assert saved[1] in (4, 5)  # as soon as the failure was known
    assert saved[-3:] == [10, 12, 15]
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")


def test_a_damaged_checkpoint_is_passed_over_and_the_losses_are_the_same(packed, whole, tmp_path):
    out = tmp_path / "run"
    run(*command(packed, out, "--checkpoint-steps", "2"))
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    output = run(*command(packed, out, "--checkpoint-steps", "2"))
    assert f"{newest} is damaged" in output
    assert "continuing" in output
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_the_run_folder_says_what_ran_and_what_came_of_it(packed, whole):
    settings = json.loads((whole / "settings.json").read_text())
    assert (settings["recipe"], settings["batch"], settings["schedule"]) == ("demo", 12, "cosine")
    environment = json.loads((whole / "environment.json").read_text())[-1]
    assert {"torch", "nvidia-dali-cuda130", "commit", "cpu", "cores"} <= environment.keys()
    assert [int(row["step"]) for row in rows(whole / "metrics.csv")] == list(range(1, 16))
    assert [int(row["step"]) for row in rows(whole / "evaluations.csv")] == [5, 10, 15]
    report = (whole / "report.md").read_text()
    last = rows(whole / "evaluations.csv")[-1]
    assert f"{float(last['top1_error']):.2%}" in report
    for picture in ("loss.png", "error.png", "images_per_second.png"):
        assert f"({picture})" in report
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_in_two_epochs_changes_nothing_else(packed, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(monkeypatch, command(packed, out, "--evaluate-epochs", "2")) == 0
    assert rows(out / "evaluations.csv") == rows(whole / "evaluations.csv")[1:]
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    steps = [path.name for path in sorted((out / "checkpoints").glob("step-*"))]
    assert steps == ["step-000000010.pt", "step-000000015.pt"]


def test_evaluate_gives_the_error_that_training_ended_with(packed, whole):
    last = rows(whole / "evaluations.csv")[-1]
    centre = run("-m", "trainer.cli", "evaluate", str(whole), "--data", str(packed))
    assert f"top-1 error {float(last['top1_error']):.2%}" in centre
    assert "over 20 images" in centre
    assert "ten crops" in run("-m", "trainer.cli", "evaluate", str(whole), "--crops", "10")


def test_evaluate_gives_the_error_of_the_best_epoch(whole, monkeypatch, capsys):
    evaluations = rows(whole / "evaluations.csv")
    best = min(evaluations, key=lambda row: float(row["top1_error"]))
    assert main(monkeypatch, ["-m", "trainer.cli", "evaluate", str(whole), "--checkpoint", "best"]) == 0
    said = f"step {best['step']}, val, centre crop: top-1 error {float(best['top1_error']):.2%}"
    assert said in capsys.readouterr().out


def test_a_sample_that_cannot_be_decoded_is_left_out_up_to_a_number(packed, tmp_path):
    data = Path(shutil.copytree(packed, tmp_path / "data"))
    shard = data / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b"\xff\xd8\xff", 2**16)  # where opening does not look
    content[place : place + 200] = bytes(200)
    shard.write_bytes(content)
    output = run(*command(data, tmp_path / "run"))
    assert f"left out: the sample in {shard} at byte {place}" in output
    assert [int(row["step"]) for row in rows(tmp_path / "run/evaluations.csv")] == [5, 10, 15]
    # One of two processes meets it. Both stop at the next line of the log, and the first saves.
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
        f"{shard} at byte {place} does not begin like a JPEG: copy the shard again"
    )


def harmed_after(steps: int, shard: Path, harm: Callable[[Path], None]) -> Callable:
    """A training loader during which something happens to a shard, once."""

    def loader(*arguments, **options):
        batches = train_loader(*arguments, **options)
        yield from islice(batches, steps)
        harm(shard)
        yield from batches

    return loader


def test_a_shard_cut_in_mid_run_ends_it_with_a_checkpoint_and_copied_again_it_goes_on(
    packed, whole, tmp_path, monkeypatch, capsys
):
    data, out = Path(shutil.copytree(packed, tmp_path / "data")), tmp_path / "run"
    shard = data / "train-000001.tar"
    content = shard.read_bytes()
    with monkeypatch.context() as patch:
        cut = harmed_after(7, shard, lambda path: os.truncate(path, 0))
        patch.setattr("trainer.train.train_loader", cut)
        assert main(patch, command(data, out, "--max-bad-samples", "5")) == 1
    output = capsys.readouterr()
    assert output.out.count("left out: the sample in") == 6
    [line] = output.err.splitlines()
    assert line.startswith(
        f"alexnet-train: more than 5 samples are damaged, the last of them the sample in {shard} at byte"
    )
    assert line.endswith("shorter: copy the shard again, or allow more with --max-bad-samples")
    [newest] = sorted(path.stem for path in (out / "checkpoints").iterdir())[-1:]
    assert newest == f"step-{int(rows(out / 'metrics.csv')[-1]['step']):09d}"

    with open(shard, "r+b") as file:
        file.write(content)
    assert main(monkeypatch, command(data, out)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")


def test_a_shard_that_can_no_longer_be_read_is_left_out_within_the_budget(
    packed, tmp_path, monkeypatch, capsys
):
    """The kernel refuses to read the lowest addresses of a process, through its `mem`, with EIO."""
    data, out = Path(shutil.copytree(packed, tmp_path / "data")), tmp_path / "run"
    shard = data / "train-000001.tar"

    def fail(path: Path) -> None:
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        for descriptor in Path("/proc/self/fd").iterdir():
            if descriptor.resolve() == path:
                os.dup2(memory, int(descriptor.name))
        os.close(memory)

    monkeypatch.setattr("trainer.train.train_loader", harmed_after(2, shard, fail))
    assert main(monkeypatch, command(data, out)) == 0
    output = capsys.readouterr().out
    lost = [line for line in output.splitlines() if "left out" in line]
    assert len(lost) == 20  # of the shard
    assert all(f"the sample in {shard} at byte" in line for line in lost)
    assert all("cannot be read: Input/output error" in line for line in lost)
    assert [int(row["step"]) for row in rows(out / "evaluations.csv")] == [5, 10, 15]


def test_metrics_are_served_while_it_trains(packed, tmp_path):
    environment = {**os.environ, "ALEXNET_PORT": "0"}
    arguments = [
        argument for argument in command(packed, tmp_path / "run") if argument not in ("--port", "0")
    ]
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["ALEXNET_PORT"] = str(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, *arguments, "--epochs", "100", "--calibrate"], env=environment
    )
    try:
        text, url = "", f"http://127.0.0.1:{environment['ALEXNET_PORT']}"
        while 'alexnet_eval_error_ratio{k="1",protocol="centre"}' not in text:
            assert process.poll() is None
            time.sleep(0.1)
            try:
                text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
            except OSError:
                continue  # not up yet
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        steps = float(values["alexnet_step"])
        assert steps >= 5
        assert float(values['alexnet_images_total{phase="train"}']) == 12 * steps
        assert float(values['alexnet_loss{phase="train"}']) > 0
        for path in ("loader", "model"):
            assert float(values[f'alexnet_ceiling_images_per_second{{path="{path}"}}']) > 0
        assert urllib.request.urlopen(f"{url}/healthz", timeout=10).read() == b"ok\n"
    finally:
        process.kill()
        process.wait()
