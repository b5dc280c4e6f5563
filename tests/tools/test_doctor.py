"""`alexnet-train doctor`: a real measurement, what it foretells, and what would stop a run."""

import json
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.calibrations import MEASURED
from tests.helpers import TINY
from tools import doctor
from tools.diagnosing import machine, rehearsal
from tools.diagnosing.findings import Ended

CPU = {"cuda": None, "precision": "fp32", "kernels": True, "gpus": 0, "nvml": {"error": "not found"}}


@pytest.fixture
def _known_machine(monkeypatch) -> None:
    """Spare the tests another process that imports torch."""
    monkeypatch.setattr(machine, "ask_hardware", lambda device: (CPU, []))


@pytest.fixture
def unmeasured(monkeypatch) -> list[list[str]]:
    """The programs that would have been started to measure; they end as if they had been killed."""
    started: list[list[str]] = []

    def run_program(command: list[str], seconds: float) -> Ended:
        started.append(command)
        return Ended(-signal.SIGKILL, "", "")

    monkeypatch.setattr(rehearsal, "run_program", run_program)
    return started


@pytest.mark.slow
@pytest.mark.usefixtures("_known_machine")
def test_without_a_dataset_drawn_pictures_are_measured_and_nothing_is_left(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "_DRAWN", {"train": 40, "val": 20})
    done = call(doctor.main, "--json", "--seconds", "1", "--port", "0", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["can_run"]
    assert found["findings"]["the run"][0]["text"].startswith("none at shards: drawn pictures of 256 px")
    measured, expected = found["measured"], found["expected"]
    assert measured["slowest"] <= measured["training"] <= measured["fastest"]
    assert min(measured["loader"], measured["net"]) > 0
    assert measured["checkpoint_bytes"] > 1_000_000
    assert measured["checkpoint_seconds"] >= measured["checkpoint_delay"] > 0
    assert measured["memory_bytes"] > 100_000_000
    # Three epochs of ImageNet take about as long as its images at the measured rate, and longer.
    assert expected["run_seconds"] > 3 * 1_281_167 / measured["training"]
    assert not list(tmp_path.iterdir())


def is_said(text: str, output: str) -> bool:
    """Return whether a table says this, however it is wrapped."""
    return "".join(text.split()) in "".join(output.split())


@pytest.mark.slow
def test_the_real_machine_is_asked_and_a_run_on_a_dataset_is_foretold(call, packed, tmp_path, monkeypatch):
    measured = replace(MEASURED, training=10.0, checkpoint_delay=1.0, checkpoint_seconds=2.0)
    monkeypatch.setattr(doctor, "rehearse", lambda *_, drawn: (measured, 20))
    arguments = ("--data", packed, "--out", tmp_path / "runs" / "a", "--port", "0", *TINY)
    done = call(doctor.main, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    titles = [line for line in done.stdout.splitlines() if line and line[0] not in " !✗"]
    expected = ["this machine", "the run", "measuring for about 70 s …", "measured", "expected"]
    assert titles == [*expected, "this run can work"]
    text = " ".join(done.stdout.split())
    assert "60 training and 20 validation images in 10 classes" in text
    assert "an epoch 9 s for 60 images" in text  # 60 / 10 + 2 + 1
    assert "the run 33 s for 3 epochs of recipe demo" in text  # 5 + 3 × 9 + 2 − 1
    assert not list(tmp_path.iterdir())  # no folder of a run


@pytest.mark.usefixtures("_known_machine")
def test_everything_that_would_stop_a_run_is_reported_and_then_nothing_is_measured(
    call, tmp_path, unmeasured
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        arguments = ("--data", tmp_path / "none", "--out", tmp_path / "run")
        done = call(doctor.main, *arguments, "--address", "127.0.0.1", "--port", port)
    assert done.returncode == 1
    assert "2 of these (✗) would stop this run" in done.stdout
    assert is_said(f"✗ dataset no dataset at {tmp_path}/none", done.stdout)
    assert is_said(f"✗ port port {port} is in use: choose another with --port", done.stdout)
    assert not unmeasured
    done = call(doctor.main, "--out", tmp_path / "run", "--port", "0", "--json", "--data", tmp_path / "none")
    assert not json.loads(done.stdout)["can_run"]


@pytest.mark.usefixtures("_known_machine")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--crop", "81"), "--crop 81 does not fit into images of 80 px"),
        (("--batch", "9", "--processes", "2"), "--batch 9 cannot be divided evenly among 2 processes"),
    ],
)
def test_settings_that_do_not_suit_the_dataset_are_problems(
    call, packed, tmp_path, unmeasured, settings, message
):
    done = call(doctor.main, "--data", packed, "--out", tmp_path / "run", "--port", "0", *TINY, *settings)
    assert done.returncode == 1
    assert message in " ".join(done.stdout.split())
    assert not unmeasured


@pytest.mark.usefixtures("_known_machine")
def test_a_measurement_that_is_killed_is_a_problem(call, packed, tmp_path, unmeasured):
    done = call(doctor.main, "--data", packed, "--out", tmp_path / "run", "--port", "0", *TINY)
    assert done.returncode == 1
    assert "✗ training" in done.stdout
    assert is_said("use a smaller --batch", done.stdout)
    assert len(unmeasured) == 1
    assert not list(tmp_path.iterdir())


def test_a_driver_that_hangs_ends_the_examination(call, tmp_path, monkeypatch, unmeasured):
    monkeypatch.setattr(machine, "run_program", lambda *_: Ended(None, "", ""))
    done = call(doctor.main, "--port", "0", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "✗ GPU           its driver does not answer" in done.stdout
    assert "1 of these (✗) would stop this run" in done.stdout
    assert not unmeasured


def test_an_impossible_setting_is_refused_in_one_line(call):
    done = call(doctor.main, "--epochs", "many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("doctor: --epochs many: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("_known_machine")
def test_a_missing_dataset_of_the_environment_is_a_problem(call, tmp_path, monkeypatch, unmeasured):
    monkeypatch.setenv("ALEXNET_DATA", str(tmp_path / "none"))
    done = call(doctor.main, "--port", "0", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert is_said(f"✗ dataset no dataset at {tmp_path}/none", done.stdout)
    assert not unmeasured


def test_in_the_image_a_missing_dataset_is_only_noted(call, tmp_path, monkeypatch, unmeasured):
    monkeypatch.setattr(machine, "ask_hardware", lambda device: (CPU, []))
    monkeypatch.setattr(rehearsal, "_DRAWN", {"train": 20, "val": 10})
    monkeypatch.setenv("container", "oci")
    monkeypatch.setenv("ALEXNET_DATA", str(tmp_path / "data"))
    done = call(doctor.main, "--port", "0", "--out", tmp_path / "run")
    assert is_said("! dataset none at ", done.stdout)
    [command] = unmeasured
    assert Path(command[command.index("--data") + 1]).name == "shards"
