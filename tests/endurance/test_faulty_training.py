"""Training on storage that fails: the reports of the harness and a sample of its cases."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endurance import faulty_training
from tests.endurance.faulty_storage import Call, Fault
from tests.endurance.faulty_training import Training
from tests.endurance.jobs import Outcome
from tests.helpers import REPO, command, main

FAULT = Fault(Call("write", "run/metrics.csv"), 1, "EIO", lasting=True)
SAID = "alexnet-train: run/metrics.csv: Input/output error: fix the cause"


class Stub(Training):
    """A training job whose lives end as given, after changing the run folder as given."""

    def __init__(self, whole: Path, folder: Path):
        self.folder, self.run, self.begun = folder, faulty_training.Run(folder / "run"), folder / "begun"
        self.arguments = []
        shutil.copytree(whole, self.begun)
        self._prepare()
        self.whole = self._content()


@pytest.fixture
def violations(packed, tmp_path, monkeypatch):
    """Return the violations of a life that ends with a code and a text, and changes the run folder."""
    whole = tmp_path / "whole"
    assert main(monkeypatch, command(packed, whole, "--checkpoint-steps", "2")) == 0
    job = Stub(whole, tmp_path)

    def judge(code: int, text: str, change=lambda folder: None) -> str:
        def live(*_: object) -> Outcome:
            if not lives:
                change(job.run.folder)
            lives.append(Outcome(code if not lives else 0, text if not lives else "", {}, 1))
            return lives[-1]

        lives: list[Outcome] = []
        monkeypatch.setattr(faulty_training, "live", live)
        return "; ".join(job.try_fault(FAULT)[1])

    return judge


def test_a_run_that_succeeds_or_explains_its_failure_passes(violations):
    assert violations(0, "") == ""
    assert violations(1, SAID) == ""


def test_lost_work_and_unexplained_failures_are_violations(violations):
    def lose(kind: str):
        return lambda run: [path.unlink() for path in (run / "checkpoints").glob(f"{kind}-*")]

    assert "Traceback" in violations(1, f"Traceback\n{SAID}")
    assert "no reason" in violations(1, "alexnet-train: run/metrics.csv")
    assert "no file" in violations(1, "alexnet-train: Input/output error")
    assert "0 lines" in violations(1, "")
    assert "SIGKILL" in violations(-9, "")
    assert re.search(r"best \d+ is lost", violations(1, SAID, lose("best")))
    assert "step 15 is lost" in violations(1, SAID, lose("step"))
    assert "other rows with code 0" in violations(0, "", lambda run: (run / "metrics.csv").unlink())
    assert "without a report" in violations(0, "", lambda run: (run / "report.md").unlink())


@pytest.mark.slow
@pytest.mark.parametrize("job", ["training", "continuing"])
def test_training_survives_a_sample_of_all_faults(job):
    command = [sys.executable, "tests/endurance/faults.py", job, "--seconds", "50", "--seed", "2012"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
