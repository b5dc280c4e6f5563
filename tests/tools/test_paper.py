"""alexnet-train paper: a small grid that is really trained, and requests that are refused."""

import subprocess
import sys

import pytest

from pipeline.manifest import read_manifest
from tests.helpers import REPO
from tools.experiments.measuring import CENTRE, TRAIN
from tools.experiments.record import TOP1, TOP5, Record
from tools.paper import main
from trainer.run import Run

# A narrow net on the CPU, whose checkpoints have 2 MB; those of the paper's net are 100 times as large.
QUICK = ("--recipe", "demo", "--crop", "64", "--epochs", "1", "--batch", "12", "--warmup-epochs", "0")
QUICK += ("--width", "0.125", "--device", "cpu", "--precision", "fp32")


@pytest.mark.slow
def test_a_grid_is_trained_once_and_reported(packed, tmp_path, call):
    out = tmp_path / "paper"
    grid = ("ablations", "--data", packed, "--out", out, "--seeds", "2", "--only", "one-GPU net", *QUICK)
    command = [sys.executable, "tools/paper.py", *map(str, grid), "--jobs", "2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = Record.read(out / "ablations.json")
    whole, half = record.rows
    assert (whole.system, half.system, half.than) == ("AlexNet", "one-GPU net", "AlexNet")
    assert [(out / figure.file).exists() for figure in record.figures] == [True]
    assert {row.table(measure).shape for row in (whole, half) for measure in (TOP1, TOP5, CENTRE)} == {
        (2, 20)
    }
    for row, name in ((whole, "AlexNet"), (half, "one-GPU-net")):
        ends = [Run(out / "ablations" / f"{name}-{seed}").evaluations.rows()[-1] for seed in range(2)]
        assert row.values(CENTRE) == pytest.approx([100 * end["top1_error"] for end in ends])
        # Errors are whole images: 60 for training, and 20 for validation.
        assert [error * 60 / 100 % 1 for error in row.values(TRAIN)] == pytest.approx([0, 0], abs=1e-9)
    assert [(run.name, run.seed, run.settings) for run in record.runs] == [
        ("AlexNet-0", 0, {}),
        ("one-GPU-net-0", 0, {"towers": 1}),
        ("AlexNet-1", 1, {}),
        ("one-GPU-net-1", 1, {"towers": 1}),
    ]
    reproduces = {
        "recipe": "demo",
        "epochs": 1,
        "dropout": "off",
        "learning_rate": 0.003,
        "precision": "fp32",
    }
    assert reproduces.items() <= record.settings.items()
    assert all(run.minutes > 0 for run in record.runs)
    assert record.dataset["fingerprint"] == read_manifest(packed).fingerprint
    assert record.dataset["shard_samples"] == 25
    logs = {path: path.read_text() for path in (out / "ablations").glob("*.log")}
    assert len(logs) == 4
    assert call(main, *grid).returncode == 0
    assert {path: path.read_text() for path in logs} == logs  # nothing was trained again
    assert call(main, "report", "--out", out).stdout.strip() == str(out / "README.md")
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
