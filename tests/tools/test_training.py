"""Training runs of experiments: their share of the threads, and what a record says of them."""

import subprocess
from pathlib import Path

import pytest

from pipeline.manifest import read_manifest, write_manifest
from tools.experiments import training
from tools.experiments.training import DivergedError, Training, TrainingError, describe, provenance, train
from trainer.run import Run
from trainer.setting_sources import load_settings


@pytest.fixture
def failing(monkeypatch) -> dict[str, dict[str, str]]:
    """Make training fail with the last line of its log; holds the environment that it was given."""
    given = {}

    def run(*_: object, stdout, env: dict[str, str], **__: object) -> subprocess.CompletedProcess:
        given["environment"] = env
        stdout.write("epoch 1\nalexnet-train: the weights are no longer finite. Start a new run\n")
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(training.subprocess, "run", run)
    return given


@pytest.mark.parametrize(
    ("variable", "jobs", "threads"), [(None, 1, "8"), (None, 3, "2"), (None, 9, "1"), ("5", 3, "5")]
)
def test_runs_trained_at_the_same_time_share_the_threads(
    variable, jobs, threads, failing, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(TrainingError, match="run ended with exit code 1"):
        train(Training(tmp_path / "run", []), jobs)
    assert failing["environment"]["OMP_NUM_THREADS"] == threads


def test_a_run_that_diverged_is_not_trained_again(failing, tmp_path):
    for message in ("run ended with exit code 1.*no longer finite", "run has diverged"):
        with pytest.raises(DivergedError, match=message):
            train(Training(tmp_path / "run", []))
    assert (tmp_path / "run.log").read_text().count("epoch 1") == 1


def begun(folder: Path, data: Path, *arguments: str) -> Run:
    """Begin a run of one step of 12 images at 4 images/s, which trained in bf16."""
    small = ["--recipe", "demo", "--batch", "12", "--crop", "64"]
    settings = load_settings(["--data", str(data), *small, *arguments])
    run = Run(folder)
    run.begin(settings, read_manifest(data)).close()
    run.keep_resolved(settings, {"device": "cpu", "precision": "bf16"})
    run.metrics.append({"step": 10, "epoch": 1, "loss": 1, "error": 1, "images_per_second": 4})
    return run


def test_a_record_says_what_runs_have_in_common_and_in_what_they_differ(packed, tmp_path):
    before = begun(tmp_path / "before", packed, "--seed", "7", "--learning-rate", "0.5", "--out", "elsewhere")
    after = begun(tmp_path / "after", packed, "--initial-weights", str(tmp_path / "before"), "--no-lrn")
    found = provenance([before, after])
    common = {"recipe": "demo", "epochs": 3, "dropout": "off", "precision": "bf16", "crop": 64, "batch": 12}
    assert common.items() <= found["settings"].items()
    assert not {"out", "data", "seed", "learning_rate", "device"} & found["settings"].keys()
    first, second = found["runs"]
    assert (first.name, first.seed, first.settings) == ("before", 7, {"learning_rate": 0.5})
    assert second.settings == {"learning_rate": 0.003, "lrn": False, "initial_weights": "before"}
    assert second.minutes == 10 * 12 / 4 / 60


def test_a_record_tells_originals_from_resized_images(packed_copy):
    assert "60 training and 20 validation images of 10 classes, 80 px, " in describe(packed_copy)
    originals = {"geometry": "original", "max_width": 500, "max_height": 375}
    write_manifest(packed_copy, read_manifest(packed_copy).model_copy(update=originals))
    assert " classes, originals of at most 500×375 px, " in describe(packed_copy)
