"""The soak test: its samples, when it reports growth, and a short run of the real trainer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.endurance import soak
from tests.events import at_event
from tests.helpers import free_port

FLAT = dict(zip(soak.SERIES, (5e8, 2e8, 0.0, 10.0, 9.0, 2.0), strict=True))
STEPS = 1000

HOLDS = """
import mmap, threading, time
memory = b"x" * (64 << 20)
shared = mmap.mmap(-1, 8 << 20)
shared.write(memory[: 8 << 20])
files = [open("/dev/null") for _ in range(20)]
for _ in range(3):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
time.sleep(600)
"""
STARTS = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def samples(**changed) -> soak.Samples:
    """A sample every ten steps; the values of changed series are functions of the step."""
    steps = [float(step) for step in range(0, STEPS, 10)]
    values = {name: [value] * len(steps) for name, value in FLAT.items()}
    return {"step": steps} | values | {name: list(map(of, steps)) for name, of in changed.items()}


def main(monkeypatch, *arguments: object) -> object:
    """Run the command; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["soak.py", *map(str, arguments)])
    try:
        soak.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("changed", "grew"),
    [
        ({}, []),
        ({"threads": lambda step: 9 + 6 * (step % 50 == 0)}, []),  # threads that save
        ({"resident_bytes": lambda step: 5e8 * min(1, 0.5 + step / 300)}, []),  # the warm-up
        ({"resident_bytes": lambda step: 5e8 - 1e4 * step}, []),
        ({"anonymous_bytes": lambda step: 2e8 + 1e4 * step}, ["anonymous_bytes"]),
        ({"open_files": lambda step: 10 + step // 500, "threads": lambda step: 9 + step // 100},
         ["open_files", "threads"]),
        ({"shared_bytes": lambda step: 4096.0 * (step > 800)}, ["shared_bytes"]),
        ({"connections": lambda step: 4.0 if step > 800 else 8.0 * (step < 100)}, []),  # some are closed
        ({"connections": lambda step: 2.0 + step // 300}, ["connections"]),
    ],
)  # fmt: skip
def test_a_series_that_grows_is_named_and_fails_the_soak(changed, grew, monkeypatch, tmp_path, capsys):
    grown = soak.growth(samples(**changed), STEPS)
    monkeypatch.setattr(soak, "soak", lambda options, rest: ({}, grown))
    code = main(monkeypatch, "--out", tmp_path)
    assert code == (f"soak: grew by more than 1 %: {', '.join(grew)}" if grew else 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("GREW")] == grew
    assert len(lines) == len(FLAT)


def test_growth_is_a_percentage_of_the_median_after_the_warm_up():
    grown = soak.growth(samples(threads=lambda step: 100 + step / 10), STEPS)["threads"]
    assert grown == {"before": 124.5, "after": 194.5, "percent": pytest.approx(100 * 70 / 124.5)}


def test_too_few_samples_in_a_window_are_an_error():
    thin = {name: values[::4] for name, values in samples().items()}
    with pytest.raises(soak.SoakError, match="fewer than 5 samples in a tenth"):
        soak.growth(thin, STEPS)


def test_a_sample_covers_a_process_and_its_children():
    command = [sys.executable, "-c", STARTS, HOLDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            figures = soak.sample(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert figures["threads"] == 1 + 4  # of the process and of its child
    assert 20 < figures["open_files"] < 40
    assert figures["shared_bytes"] == 8 << 20
    assert 64 << 20 < figures["anonymous_bytes"] < 100 << 20
    assert figures["resident_bytes"] > figures["anonymous_bytes"] + figures["shared_bytes"]


def test_a_failing_trainer_is_reported_with_its_last_line(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with pytest.raises(soak.SoakError, match=r"ended with exit code 1, see .*trainer\.log: the disk is full"):
        soak.watch(command, free_port(), 100, 0.05, tmp_path / "trainer.log")


@pytest.fixture
def _sampled_steps(monkeypatch, tmp_path) -> None:
    """Make the trainer wait at steps 30 and 100 until they have been sampled, on any machine.

    These steps are in the two tenths whose medians are compared. The 4th and the 13th row of metrics follow
    them, since a row is written every ten steps and, at the end of an epoch, every fifteen.
    """
    hold = f"hold({str(tmp_path / 'step-')!r} + {{4: '30', 13: '100'}}[number])"
    rows = tmp_path / "run/metrics.csv"
    environment = at_event((4, 13), hold, tmp_path / "events", rows, only="open .* a$")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    step_of, sample, steps = soak.step_of, soak.sample, []

    def seen(port: int) -> float | None:
        steps.append(step_of(port))
        return steps[-1]

    def sampled(pid: int) -> dict[str, float]:
        figures = sample(pid)
        (tmp_path / f"step-{steps[-1]:.0f}").touch()
        return figures

    monkeypatch.setattr(soak, "step_of", seen)
    monkeypatch.setattr(soak, "sample", sampled)


@pytest.mark.slow
@pytest.mark.usefixtures("_sampled_steps")
def test_a_short_soak_writes_a_record_and_a_plot(packed, monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "LEAST", 1)  # as the run takes only seconds
    arguments = ("--out", tmp_path, "--data", packed, "--batch", 4, "--steps", 100, "--seconds", 0.02)
    arguments += ("--limit", 1000, "--device", "cpu", "--precision", "fp32")
    assert main(monkeypatch, *arguments) == 0
    record = json.loads((tmp_path / "soak.json").read_text())
    assert (record["steps"], record["batch"], record["evaluations"]) == (105, 4, 7)
    assert "torch" in record["environment"]
    taken = record["samples"]
    assert taken["step"] == sorted(taken["step"])
    assert {30, 100} <= set(taken["step"])
    assert 0 < taken["step"][0] < taken["step"][-1] < 105
    for name in soak.SERIES:
        assert len(taken[name]) == len(taken["step"])
        assert min(taken[name]) > 0 or name == "shared_bytes"
    assert Image.open(tmp_path / "soak.png").width == 1100
    (checkpoint,) = Path(tmp_path / "run/checkpoints").glob("step-000000105.pt")
    assert checkpoint.stat().st_size < 1_000_000  # of the narrow net
    assert "already exists" in str(main(monkeypatch, *arguments))
