"""The demo: the commands it announces, and the whole workflow in one command."""

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.demo import demo

SCRIPT = Path(sys.executable).with_name("alexnet-train")


@pytest.mark.parametrize("on_path", [True, False], ids=["activated", "by path"])
def test_announced_commands_can_be_typed(on_path, tmp_path, monkeypatch, capfd):
    """`make demo` starts .venv/bin/alexnet-train, in a shell where the environment may not be activated."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "demo"])
    monkeypatch.setenv("PATH", f"{SCRIPT.parent}:/usr/bin:/bin" if on_path else "/usr/bin:/bin")
    (tmp_path / ".pictures.partial").touch()  # drawing fails, so the demo ends after its first command
    assert demo(tmp_path) != 0
    announced = capfd.readouterr().out.splitlines()[0]
    program = "alexnet-train" if on_path else str(SCRIPT)
    assert announced == f"$ {program} draw-pictures --out {tmp_path}/pictures"
    typed = shlex.split(announced.removeprefix("$ ") + " --help")
    assert subprocess.run(typed, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)  # trains for longer than all other tests
def test_the_demo_learns_its_classes_and_names_its_report(tmp_path):
    folder = tmp_path / "demo"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "demo", "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"ALEXNET_PORT": "0"},
    )
    assert done.returncode == 0, done.stderr
    with open(folder / "run/evaluations.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["images"]) == 500
    assert float(last["top1_error"]) < 0.2  # chance is .9
    assert str(folder / "run/report.md") in done.stdout
    assert (folder / "run/report.md").is_file()
