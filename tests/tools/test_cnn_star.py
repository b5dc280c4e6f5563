"""The runs that CNN* needs, and its rows. The trainer's own tests cover training."""

import argparse
from pathlib import Path

import pytest

from tools.experiments import cnn_star
from tools.experiments.record import TOP1
from tools.experiments.training import Training
from trainer.settings import Settings, load_settings


@pytest.fixture
def trainings(monkeypatch) -> list[list[Training]]:
    """The groups of runs that were requested; the nth run has a top-1 error of n/100."""
    requested: list[list[Training]] = []

    def train_all(batch: list[Training], _jobs: int) -> list[dict[str, float]]:
        before = sum(map(len, requested))
        requested.append(batch)
        return [{"top1_error": (before + n) / 100, "top5_error": 0.0} for n in range(len(batch))]

    monkeypatch.setattr(cnn_star, "train_all", train_all)
    monkeypatch.setattr(cnn_star, "describe", str)
    monkeypatch.setattr(cnn_star, "about", lambda _: {"data": "", "command": "", "environment": {}})
    return requested


def settings_of(training: Training) -> Settings:
    return load_settings(training.settings)


def test_fine_tuning_follows_its_seeds_pre_training_at_small_learning_rates(trainings, tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    cnn_star.add_arguments(parser)
    given = ["--out", str(tmp_path), "--pretrain", "large", "--seeds", "2"]
    given += ["--pretrain-settings", "--epochs 5"]
    record = cnn_star.run(
        parser.parse_args(given), ["--data", "small", "--learning-rate", "0.02", "--epochs", "9"]
    )

    before, after = trainings
    plain, random, first = before[:2], before[2:4], before[4:]
    assert [settings_of(t).conv6 for t in before] == [False] * 2 + [True] * 4
    assert {(settings_of(t).data, settings_of(t).epochs) for t in first} == {(Path("large"), 5)}
    assert {(settings_of(t).data, settings_of(t).epochs) for t in plain + random + after} == {
        (Path("small"), 9)
    }
    assert [settings_of(t).initial_weights for t in after] == [t.folder for t in first]
    for batch in (plain, random, first, after):
        assert [settings_of(t).seed for t in batch] == [0, 1]
    for training in after:
        fine = settings_of(training)
        assert (fine.conv6, fine.learning_rate, fine.layer_learning_rates) == (True, 0.002, {"conv1": 0.1})

    one, untrained, star = record.rows
    measured = [row.measured[TOP1] for row in (one, untrained, star)]
    assert measured == [pytest.approx(values) for values in ([0, 1], [2, 3], [6, 7])]
    assert star.than == untrained.than == one.system
