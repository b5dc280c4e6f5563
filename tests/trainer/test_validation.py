"""When a run stops early, and what an evaluation shows for few classes."""

import csv
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest

from pipeline.loader import train_loader
from tests.helpers import command, exact, main, rows, run
from tests.trainer.processes.test_two_processes import torchrun
from tests.trees import pack_here
from trainer.evaluate import evaluate
from trainer.monitor.metrics import Metrics
from trainer.run import Run
from trainer.validation import count_stale

FROZEN = ["--learning-rate", "1e-30", "--epochs", "9"]  # the error stays the same


@pytest.mark.parametrize(
    ("errors", "stale"),
    [
        ([], 0),
        ([0.5], 0),
        ([0.5, 0.4], 0),
        ([0.4, 0.4], 1),
        ([0.5, 0.3, 0.4, 0.31, 0.3], 3),
        ([0.1, 0.2, 0.0], 0),
    ],
)
def test_evaluations_since_the_lowest_error_are_counted(errors, stale):
    assert count_stale(errors) == stale


@pytest.fixture
def scripted(monkeypatch):
    """scripted(out, errors): let the evaluations of the run in `out` have these top-1 errors."""

    def patch(out, errors) -> None:
        def evaluated(*arguments):
            return replace(evaluate(*arguments), top1_error=errors[len(rows(out / "evaluations.csv"))])

        monkeypatch.setattr("trainer.validation.evaluate", evaluated)

    return patch


ERRORS = [0.8, 0.5, 0.5, 0.6, 0.4, 0.3]
STOPPED = "epoch 4.00  stopped early: 2 evaluations without a lower validation error"


def test_a_run_stops_after_some_evaluations_without_a_lower_error_and_stays_so(
    packed, tmp_path, monkeypatch, capsys, scripted
):
    out, metrics, again = tmp_path / "run", Metrics(), Metrics()
    scripted(out, ERRORS)
    monkeypatch.setattr("trainer.train.Metrics", lambda: metrics)
    arguments = command(packed, out, "--epochs", "6", "--stop-after", "2")
    assert main(monkeypatch, arguments) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-2:] == [STOPPED, f"done: {out / 'report.md'}"]
    assert metrics.value("progress_ratio") == 1
    assert metrics.value("images_total", phase="train") == 12 * metrics.value("step") == 12 * 20
    assert [float(row["top1_error"]) for row in rows(out / "evaluations.csv")] == ERRORS[:4]
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best-000000010.pt", "step-000000015.pt", "step-000000020.pt"]
    report = (out / "report.md").read_text()
    assert (
        "The run stopped early: in 2 evaluations, the top-1 error was not lower than after 2.00 epochs"
        in report
    )
    assert "## Errors by class" in report
    assert Run(out).is_finished

    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    monkeypatch.setattr("trainer.train.Metrics", lambda: again)
    assert main(monkeypatch, arguments) == 0
    assert (again.value("step"), again.value("epoch"), again.value("progress_ratio")) == (20, 4, 1)
    assert STOPPED in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.glob("*.csv")} == before
    assert main(monkeypatch, [*arguments, "--stop-after", "3"]) == 2
    assert "stop_after (2 there, 3 here)" in capsys.readouterr().err


def test_a_run_that_was_interrupted_stops_at_the_same_step(packed, tmp_path, monkeypatch, scripted):
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = ["--epochs", "6", "--stop-after", "2"]
    scripted(whole, ERRORS)
    assert main(monkeypatch, command(packed, whole, *options)) == 0
    scripted(out, ERRORS)

    def stopped(*arguments, **others):
        for step, batch in enumerate(train_loader(*arguments, **others), 1):
            if step == 17:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.train_loader", stopped)
        assert main(patch, command(packed, out, *options)) == 143
    assert not Run(out).is_finished
    assert main(monkeypatch, command(packed, out, *options)) == 0
    assert exact(out / "metrics.csv") == exact(whole / "metrics.csv")
    for name in ("evaluations.csv", "errors_by_class.csv", "confusion.csv", "mistakes.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_killed_after_its_last_evaluation_still_reports_its_details(
    packed, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in [out / "report.md", *out.glob("*.png")]:
        path.unlink()
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "2")) == 0
    assert (out / "report.md").read_text().count("mistakes.png") == 1
    assert (out / "mistakes.png").exists()


def test_only_evaluations_that_may_be_the_last_record_details(packed, tmp_path, monkeypatch, scripted):
    """After one epoch the error may be the second in a row that is not lower only in epochs 3 and 4."""
    out, recorders = tmp_path / "run", []
    scripted(out, [0.5, 0.6, 0.4, 0.5, 0.3, 0.2])
    evaluated = sys.modules["trainer.validation"].evaluate

    def recording(*arguments):
        recorders.append(arguments[5] is not None)
        return evaluated(*arguments)

    monkeypatch.setattr("trainer.validation.evaluate", recording)
    assert main(monkeypatch, command(packed, out, "--epochs", "6", "--stop-after", "2")) == 0
    assert recorders == [False, False, True, False, True, True]


@pytest.fixture(scope="module")
def three(pictures, tmp_path_factory):
    """Drawn pictures of only three classes, packed."""
    source, data = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("three")
    for split in ("train", "val"):
        for folder in sorted((pictures / split).iterdir())[:3]:
            shutil.copytree(folder, source / split / folder.name)
    pack_here("--input", source, "--out", data, "--size", "80")
    return data


def test_the_top5_error_of_fewer_than_six_classes_is_shown_nowhere(three, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    for metrics in (Metrics(), Metrics()):  # the second gets the last evaluation from evaluations.csv
        monkeypatch.setattr("trainer.train.Metrics", lambda metrics=metrics: metrics)
        assert main(monkeypatch, command(three, out)) == 0
        assert 'k="1"' in metrics.exposition()
        assert 'k="5"' not in metrics.exposition()
    assert main(monkeypatch, ["-m", "trainer.cli", "evaluate", str(out)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"step 5, val, centre crop: top-1 error [\d.]+%, loss [\d.]+ over 6 images", output)
    for shown in (output, (out / "report.md").read_text()):
        assert "top-1" in shown
        assert "top-5" not in shown
    assert {row["top5_error"] for row in rows(out / "evaluations.csv")} == {"0.0"}  # for other tools


def test_evaluate_writes_the_details_of_any_checkpoint(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "details"
    arguments = ["-m", "trainer.cli", "evaluate", str(whole), "--crops", "10", "--out"]
    assert main(monkeypatch, [*arguments, str(out)]) == 0
    line = capsys.readouterr().out.strip()
    assert (out / "evaluation.md").read_text().startswith(f"# Evaluation of run: {line}\n")
    errors = sum(int(row["errors"]) for row in rows(out / "errors_by_class.csv"))
    assert f"top-1 error {errors / 20:.2%}" in line
    assert main(monkeypatch, [*arguments, str(whole)]) == 2
    assert "is the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_evaluate_like_one(whole, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    output = [
        start("-m", "trainer.cli", "evaluate", str(whole), "--out", str(out)).strip()
        for start, out in ((run, one), (torchrun, two))
    ]
    assert output[0] == output[1]
    for name in ("errors_by_class.csv", "confusion.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (list(csv.reader((out / "mistakes.csv").open(newline=""))) for out in (one, two))
    assert sorted(row[:-1] for row in first) == sorted(row[:-1] for row in second)  # rounding may swap two


@pytest.mark.slow
def test_two_processes_stop_early_together(packed, tmp_path):
    out = tmp_path / "run"
    output = torchrun(*command(packed, out, *FROZEN, "--stop-after", "2"))
    assert "epoch 3.00  stopped early" in output
    assert len(rows(out / "evaluations.csv")) == 3
    assert Run(out).is_finished
    confusion = rows(out / "confusion.csv")
    assert sum(int(row["images"]) for row in confusion) == 20
