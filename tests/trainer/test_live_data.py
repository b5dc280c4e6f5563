"""What a run shows on its live page, compared with the tables in its folder."""

import csv
import shutil

import pytest

from tests.helpers import command, main, rows
from trainer.monitor.metrics import Metrics


@pytest.fixture
def metrics(monkeypatch) -> Metrics:
    """The metrics of the run that the test trains."""
    made = Metrics()
    monkeypatch.setattr("trainer.train.Metrics", lambda: made)
    return made


def test_a_run_shows_its_evaluations_errors_by_class_and_the_run_beside_it(
    packed, whole, tmp_path, metrics, monkeypatch
):
    shutil.copytree(whole, tmp_path / "first")
    out = tmp_path / "second"
    assert main(monkeypatch, command(packed, out, "--seed", "1", "--log-every", "5")) == 0
    live = metrics.live
    assert [float(row["top1_error"]) for row in rows(out / "evaluations.csv")] == [
        row["top1_error"] for row in live.evaluations
    ]
    with open(out / "errors_by_class.csv", newline="") as file:
        expected = [(row["name"], int(row["images"]), int(row["errors"])) for row in csv.DictReader(file)]
    shown = zip(live.names, live.class_errors.images, live.class_errors.errors, strict=True)
    assert list(shown) == expected
    assert live.class_errors.epoch == 3
    assert live.earlier.summary.folder.name == "first"
    assert live.earlier.differing == "seed is 1 instead of 0"


def test_a_continued_run_shows_its_earlier_evaluations(packed, whole, tmp_path, metrics, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert main(monkeypatch, command(packed, out, "--checkpoint-steps", "2")) == 0  # it is complete
    assert [row["epoch"] for row in metrics.live.evaluations] == [1, 2, 3]


def test_a_run_to_compare_with_has_to_exist(packed, tmp_path, monkeypatch, capsys):
    arguments = command(packed, tmp_path / "run", "--compare", str(tmp_path / "typo"))
    assert main(monkeypatch, arguments) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"alexnet-train: --compare {tmp_path / 'typo'}: the folder holds no run; give that of an earlier "
        "run, or omit --compare"
    ]
    assert not (tmp_path / "run").exists()
