"""The demo command draws, packs, trains and reports."""

import csv
import os
import subprocess
import sys

import pytest


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
