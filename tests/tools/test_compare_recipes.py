"""Comparing recipes: short runs on drawn pictures, and the arithmetic of the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPO
from tools import compare_recipes
from tools.experiments import rates
from trainer.setting_sources import load_settings

# A narrow net on the CPU, whose checkpoints have 2 MB; those of the paper's net are 100 times as large.
COMMON = ("--crop", "64", "--epochs", "1", "--batch", "12", "--warmup-epochs", "0")
COMMON += ("--width", "0.125", "--device", "cpu", "--precision", "fp32")


def test_points_are_differences_from_the_first_recipes_mean():
    """The two differences are +2 and −6; with one degree of freedom, t is 12.706 for 95 %."""
    scores = {
        "a": {"top1_error": [40.0, 50.0], "top5_error": [10.0, 10.0]},
        "b": {"top1_error": [42.0, 44.0], "top5_error": [8.0, 12.0]},
    }
    first, second = compare_recipes.table(scores)
    assert "45.0 % (40.0 to 50.0)" in first
    assert first.endswith("+0.0 points")
    half = 12.7062 * 4  # the standard error is the half of the range of two values
    assert second.endswith(f"-2.0 points ({-2 - half:+.1f} to {-2 + half:+.1f})")


def test_each_recipe_is_trained_at_the_best_rate_of_its_own_trials(packed, tmp_path, monkeypatch, call):
    best, trained = {"demo": 0.2, "small": 0.1}, []

    def train_all(trainings, *_, **__):
        chosen = [load_settings(training.settings) for training in trainings]
        trained.append({(run.recipe, run.learning_rate, run.seed) for run in chosen})
        errors = [abs(run.learning_rate - best[run.recipe]) for run in chosen]
        return [dict.fromkeys(compare_recipes.MEASURES, error) for error in errors]

    monkeypatch.setattr(rates, "train_all", train_all)
    monkeypatch.setattr(compare_recipes, "train_all", train_all)
    monkeypatch.setattr(compare_recipes.Run, "starts", lambda run: [{}])
    arguments = [*best, "--data", packed, "--seeds", "2", "--rates", "0.1", "0.2", "--out", tmp_path]
    done = call(compare_recipes.main, *arguments)
    assert done.returncode == 0, done.stderr
    trials, runs = trained
    assert trials == {(name, rate, 0) for name in best for rate in (0.1, 0.2)}
    assert runs == {(name, rate, seed) for name, rate in best.items() for seed in (0, 1)}
    assert [trial["rate"] for trial in json.loads(done.stdout.splitlines()[-1])["trials"]] == [0.1, 0.2] * 2


@pytest.mark.slow
def test_recipes_are_trained_with_each_seed_and_compared(packed, tmp_path, call):
    slow = tmp_path / "slow.toml"
    slow.write_text('preset = "code2012"\ndropout = "off"\nlearning_rate = 1e-9\n')
    arguments = ["demo", slow, "--data", packed, "--out", tmp_path / "runs", "--seeds", "1", "--jobs", "2"]
    command = [sys.executable, "tools/compare_recipes.py", *map(str, arguments), *COMMON]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert set(record["percent"]) == {"demo", "slow"}
    for name, measured in record["percent"].items():
        rows = (tmp_path / "runs" / f"{name}-0" / "evaluations.csv").read_text().splitlines()
        columns = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
        assert measured["top1_error"] == [pytest.approx(100 * float(columns["top1_error"]))]
    weights = sorted(Path(tmp_path).rglob("checkpoints/*"))
    before = [path.stat().st_mtime_ns for path in weights]
    gap = record["percent"]["demo"]["top1_error"][0] - record["percent"]["slow"]["top1_error"][0]
    assert call(compare_recipes.main, *arguments, *COMMON, "--within", gap - 0.1).returncode == 1
    assert [path.stat().st_mtime_ns for path in weights] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast", "pap"], "unknown recipe pap"),
        (["fast", "fast"], "two recipes have the same name"),
        (["fast", "--epoch", "1"], "unknown setting --epoch"),
        (["fast", "--seeds", "0"], "--seeds: 0 is not a whole number of at least 1"),
        (["fast", "--seeds", "1", "--data", "nowhere"], "no dataset at nowhere"),
        # The schedules of these recipes allow this setting, although that of the default recipe does not.
        (["fast", "code2012", "--evaluate-epochs", "10", "--data", "nowhere"], "no dataset at nowhere"),
        (["code2012", "fast", "--epochs", "3"], "--warmup-epochs 5.0 must be less than --epochs 3"),
    ],
)
def test_an_impossible_comparison_is_refused_in_one_line(arguments, message, tmp_path, call):
    done = call(compare_recipes.main, *arguments, "--out", tmp_path / "runs")
    assert done.returncode in (1, 2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "5"], "--seed would be the same for all runs: use --seeds"),
        (["--recipe=paper"], "--recipe would be the same for all runs: use the names of the recipes"),
        (
            ["--rates", "0.1", "--learning-rate", "0.2"],
            "--learning-rate would be the same for all runs: use --rates",
        ),
        (["--within", "nan"], "nan is not between -100 and 100"),
    ],
)
def test_what_would_undo_the_comparison_is_refused(call, arguments, message):
    done = call(compare_recipes.main, "demo", "small", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_damaged_runs_and_remote_datasets_for_rates_are_refused_in_one_line(packed, tmp_path, call):
    (tmp_path / "demo-0").mkdir()
    (tmp_path / "demo-0" / "settings.json").write_text("{")
    arguments = ("demo", "--data", packed, "--seeds", "1", "--out", tmp_path)
    done = call(compare_recipes.main, *arguments)
    assert done.stderr.startswith(f"compare-recipes: {tmp_path}/demo-0/settings.json is damaged")
    url = f"file://{packed}"
    done = call(compare_recipes.main, "demo", "--data", url, "--rates", "0.1", "--out", tmp_path)
    needs = f"compare-recipes: --rates needs a dataset on this machine: copy {url} to a folder\n"
    assert done.stderr == needs
