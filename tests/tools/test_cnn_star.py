"""The runs that CNN* needs, their rates and its rows. The trainer's own tests cover training."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from tools.experiments import cnn_star, rates
from tools.experiments.cnn_star import as_in_2012
from tools.experiments.record import TOP1, Record
from tools.experiments.training import Training
from trainer.optim import learning_rate, make_optimizer, set_learning_rate, unscheduled_rate
from trainer.setting_sources import load_settings
from trainer.settings import Settings


@pytest.fixture
def trainings(monkeypatch) -> list[list[Training]]:
    """The groups of runs that were requested; the nth trial of a group has an error of n %.

    The errors of a row are its position times ten, plus the seed.
    """
    requested: list[list[Training]] = []

    def train_all(batch: list[Training], _jobs: int, **_: object) -> list[dict[str, float]]:
        requested.append(batch)
        return [{"top1_error": n / 100, "top5_error": 0.0} for n in range(len(batch))]

    def measures(runs: list[Path], *_: object) -> dict[str, object]:
        systems = [cnn_star.ONE, cnn_star.RANDOM, cnn_star.AS_IN_2012, cnn_star.AS_USUAL]
        folders = [name.replace(" ", "-") for name in systems]
        parts = [run.name.rpartition("-") for run in runs]
        errors = [10 * folders.index(name) + int(seed) for name, _, seed in parts]
        return {"measured": {TOP1: errors}}

    for module in (cnn_star, rates):
        monkeypatch.setattr(module, "train_all", train_all)
    monkeypatch.setattr(rates, "hold_out", lambda data, _: Path(f"held-out-{data}"))
    part = SimpleNamespace(split=lambda _: SimpleNamespace(samples=3))
    monkeypatch.setattr(rates, "read_manifest", lambda _: part)
    monkeypatch.setattr(cnn_star, "measures", measures)
    monkeypatch.setattr(cnn_star, "describe", str)
    monkeypatch.setattr(cnn_star, "about", lambda _: {"data": "", "command": "", "environment": {}})
    return requested


def settings_of(training: Training) -> Settings:
    return load_settings(training.settings)


def run(out: Path, *more: str) -> Record:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    cnn_star.add_arguments(parser)
    given = ["--out", str(out), "--pretrain", "large", "--seeds", "2", "--pretrain-settings", "--epochs 5"]
    settings = ["--data", "small", "--learning-rate", "0.02", "--epochs", "27"]
    return cnn_star.run(parser.parse_args([*given, *more]), settings)


def test_fine_tuning_begins_with_its_seeds_pre_training(trainings, tmp_path):
    record = run(tmp_path)
    first, after = trainings
    assert [(s.data, s.epochs, s.conv6, s.seed) for s in map(settings_of, first)] == [
        (Path("large"), 5, True, 0),
        (Path("large"), 5, True, 1),
    ]
    chosen = [settings_of(training) for training in after]
    assert [(s.conv6, s.seed) for s in chosen] == [(n > 0, seed) for seed in (0, 1) for n in range(4)]
    assert {(s.data, s.epochs, s.learning_rate) for s in chosen} == {(Path("small"), 27, 0.02)}
    folders = [[None, None, t.folder, t.folder] for t in first]
    assert [s.initial_weights for s in chosen] == [*folders[0], *folders[1]]
    assert chosen[2].drop_epochs == (11, 21)  # 22 and 42 of 54 epochs
    assert chosen[3].layer_learning_rates == {"conv1": 0.1, "conv2": 0.3}
    assert len({t.folder for t in (*first, *after)}) == 10

    one, *others = record.rows
    assert [row.values(TOP1) for row in record.rows] == [[10 * n, 10 * n + 1] for n in range(4)]
    assert {row.than for row in others} == {one.system}
    assert f"minus that with {cnn_star.RANDOM}: +10.00 (95 %: +10.00 to +10.00)." in record.remarks[2]


def test_rates_are_chosen_on_held_out_images_before_the_runs(trainings, tmp_path):
    record = run(tmp_path, "--rates", "0.1", "0.3", "--rate-epochs", "9")
    first_trials, first, trials, after = trainings
    assert {settings_of(t).data for t in first_trials} == {Path("held-out-large")}
    assert {settings_of(t).data for t in trials} == {Path("held-out-small")}
    assert {settings_of(t).epochs for t in (*first_trials, *trials)} == {9}
    in_2012 = settings_of(trials[4])
    assert (in_2012.drop_epochs, in_2012.colour_epochs) == (pytest.approx((22 / 6, 7)), 6)  # 9 of 54 epochs
    # In each pair of trials, the first rate has the lower error.
    assert {settings_of(t).learning_rate for t in (*first, *after)} == {0.1}
    assert [(trial.rate, trial.error) for trial in record.sweep[:2]] == [(0.1, 0), (0.3, 1)]


@pytest.mark.parametrize(
    ("epoch", "conv1", "conv2", "fc8"),
    [
        (0.0, 1e-4, 1e-3, 1e-3),
        (0.03, 1e-4, 1e-3, 1e-3),
        (0.24, 1e-4, 1e-3, 1e-2),
        (4.99, 1e-4, 1e-3, 1e-2),
        (5.0, 1e-5, 1e-3, 1e-2),
        (7.0, 0, 1e-3, 1e-2),
        (9.0, 0, 1e-3, 1e-3),
        (22.0, 0, 1e-4, 1e-4),
        (42.0, 0, 1e-5, 1e-5),
        (54.0, 0, 1e-5, 1e-5),
    ],
)
@pytest.mark.parametrize("epochs", [54, 27])
def test_the_rates_are_those_of_the_release(epoch, conv1, conv2, fc8, epochs):
    """The notes (lines 181 to 193 of layer-params-146-2012-2011.cfg) by hand; epsB is .02, and 0 in conv1."""
    net = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("conv1", "conv2", "fc8")})
    run = load_settings(["--recipe", "code2012", "--epochs", str(epochs), *as_in_2012(epochs)])
    optimizer, now = make_optimizer(net, run), epoch * epochs / 54
    set_learning_rate(optimizer, learning_rate(run, now, []), now, unscheduled_rate(run, now))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in net.named_parameters()}
    assert found == pytest.approx(
        {
            "conv1.weight": conv1,
            "conv1.bias": 0.02 if epoch < 7 else 0,
            "conv2.weight": conv2,
            "conv2.bias": 0.02,
            "fc8.weight": fc8,
            "fc8.bias": 0.02,
        }
    )
    assert run.colour_epochs == {54: 38, 27: 19}[epochs]
