"""alexnet-train paper: a small grid that is really trained, and the arithmetic and text of records."""

import subprocess
import sys

import pytest

from tests.helpers import REPO
from tools.experiments.record import Record, RecordError, Row, differences, spread, verdict
from tools.paper import main

# A narrow net on the CPU, whose checkpoints have 2 MB; those of the paper's net are 100 times as large.
QUICK = ("--recipe", "demo", "--crop", "64", "--epochs", "1", "--batch", "12", "--warmup-epochs", "0")
QUICK += ("--width", "0.125", "--device", "cpu", "--precision", "fp32")


def record(*rows: Row) -> Record:
    return Record(
        experiment="ablations",
        title="Ablations",
        source="section 3",
        data="drawn pictures",
        command="alexnet-train paper ablations",
        environment={"torch": "2"},
        rows=list(rows),
    )


def test_a_verdict_needs_all_seeds_to_agree():
    assert verdict([0.5, 2.0], 1.0) == "as published"
    assert verdict([-0.5, -2.0], 1.0) == "opposite"
    assert verdict([-0.5, 2.0], 1.0) == "within the spread"
    assert verdict([0.0, 2.0], 1.0) == "within the spread"
    assert verdict([3.0], 1.0) == "one run"


def test_differences_are_between_runs_of_the_same_seed():
    whole = Row(system="AlexNet", measured={"error": [40.0, 50.0]})
    less = Row(system="no LRN", measured={"error": [41.0, 53.0]}, than="AlexNet", published={"error": 1.4})
    assert differences(less, whole, "error") == [1.0, 3.0]
    cells = "+1.4 vs. AlexNet | 47.00 (41.00 to 53.00) | +2.00 (+1.00 to +3.00) | as published"
    assert f"| no LRN | error | {cells} |" in str(record(whole, less))
    assert spread([2.0]) == "2.00"


def test_a_record_reads_back_and_other_files_are_refused(tmp_path):
    written = record(Row(system="AlexNet", measured={"error (%)": [40.0]}))
    path = written.save(tmp_path)
    assert Record.read(path) == written
    path.write_text('{"rows": []}')
    with pytest.raises(RecordError, match=r"ablations.json is not a record"):
        Record.read(path)


@pytest.mark.slow
def test_a_grid_is_trained_once_and_reported(packed, tmp_path, call):
    out = tmp_path / "paper"
    grid = ("ablations", "--data", packed, "--out", out, "--seeds", "2", "--only", "one-GPU net", *QUICK)
    command = [sys.executable, "tools/paper.py", *map(str, grid), "--jobs", "2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, half = Record.read(out / "ablations.json").rows
    assert (whole.system, half.system, half.than) == ("AlexNet", "one-GPU net", "AlexNet")
    assert [len(values) for row in (whole, half) for values in row.measured.values()] == [2] * 4
    logs = {path: path.read_text() for path in (out / "ablations").glob("*.log")}
    assert len(logs) == 4
    assert call(main, *grid).returncode == 0
    assert {path: path.read_text() for path in logs} == logs  # nothing was trained again
    assert call(main, "report", "--out", out).stdout.strip() == str(out / "results.md")
    assert (
        "| one-GPU net (section 3.2) | top-1 error (%) | +1.7 vs. AlexNet |"
        in (out / "results.md").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "no records in"),
        (["report", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["ablation"], "invalid choice: 'ablation'"),
        (["ablations", "--recipe", "small"], "'no colour augmentation' changes nothing"),
        (["ablations", "--data", "nowhere"], "no dataset at nowhere"),
        (["ablations", "--jobs", "0"], "--jobs: 0 is not a whole number of at least 1"),
        (["ablations", "--epoch", "3"], "unknown setting --epoch; did you mean --epochs?"),
    ],
)
def test_impossible_experiments_are_refused_in_one_line(arguments, message, tmp_path, call):
    done = call(main, *arguments, "--out", tmp_path / "paper")
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["paper", "report", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=f"paper: {tmp_path}/file: File exists"):
        main()
