"""Numerical checks: which ones end a run, what it leaves, and which ones only warn."""

import math

import pytest
import torch

from pipeline.loader import train_loader
from tests.helpers import command, main, rows
from trainer.monitor.health import CHANCE_STEPS, MAX_SKIPS, Health
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.run import RunError
from trainer.settings import Settings
from trainer.step import Condition, Skips

NONE = Skips(0, 0)
SOUND = Condition(True, 1.0, NONE)
CHANCE = {"reason": "chance"}


def interval(loss: float) -> Interval:
    return Interval(20, 2560, loss=loss, error=0.5, seconds=1, wait_seconds=0, busy_seconds=1, ready=20)


@pytest.fixture
def health(tmp_path):
    """Return a function that makes the Health of a run that has a checkpoint, for a given policy."""
    newest = tmp_path / "step-000000040.pt"
    return lambda on_nan: Health(Settings(on_nan=on_nan, warmup_epochs=1), 1000, lambda: newest, Metrics())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_by_default_and_names_the_last_good_checkpoint(health, loss):
    with pytest.raises(RunError, match=r"loss .* not finite.*step-000000040\.pt.*--on-nan skip"):
        health(Settings().on_nan).check(interval(loss), SOUND, 2.0, 40)


def test_skipped_steps_are_reported_and_counted(health):
    health = health("skip")
    skips = Skips(2, 0)
    assert health.check(interval(math.nan), Condition(True, 1.0, skips), 2.0, 40) == [
        "skipped 2 of the last 20 updates: gradients were not finite"
    ]
    value = health.metrics.registry.get_sample_value
    assert value("alexnet_skipped_steps_total") == 2
    assert value("alexnet_unsound_intervals_total", {"reason": "not finite"}) == 1


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize(
    ("weights", "scale", "skips", "what"),
    [
        (False, 1.0, NONE, "the weights are no longer finite"),
        (True, 0.5, NONE, "fp16 loss scale fell to 0.5"),
        (True, 1.0, Skips(20, MAX_SKIPS), f"gradients of {MAX_SKIPS} consecutive steps"),
    ],
)
def test_a_run_that_cannot_recover_ends_with_either_policy(health, on_nan, weights, scale, skips, what):
    with pytest.raises(RunError, match=what):
        health(on_nan).check(interval(2.0), Condition(weights, scale, skips), 2.0, 40)


def test_a_loss_that_stays_at_chance_level_is_reported_once(health):
    health, chance, steps_an_epoch = health("stop"), interval(math.log(1000) - 0.05), 1000
    said = {
        epoch: health.check(chance, SOUND, epoch, int(epoch * steps_an_epoch))
        for epoch in (0.0, 0.5, 1.0, 2.0, 3.0, 3.9, 4.0, 5.0)  # the first is the warm-up
    }
    assert [epoch for epoch, warnings in said.items() if warnings] == [4.0]
    assert "for 3.0 epochs" in said[4.0][0]


def test_time_at_chance_level_includes_the_time_before_a_resume(health):
    loss, said, resumed = math.log(1000), [], []
    history = [{"loss": 5.0, "epoch": 2.0, "step": 2000.0}]
    for epoch in range(3, 9):  # each in a separate process
        process = health("stop")
        process.restore(history)
        resumed.append(process.metrics.registry.get_sample_value("alexnet_unsound_intervals_total", CHANCE))
        if process.check(interval(loss), SOUND, float(epoch), epoch * 1000):
            said.append(epoch)
        history.append({"loss": loss, "epoch": float(epoch), "step": epoch * 1000.0})
    assert said == [6]
    assert not any(resumed)  # intervals before a resume are not counted again


def test_chance_level_for_a_few_steps_or_with_a_pause_is_not_reported(health):
    chance = interval(math.log(1000))
    few, pause = health("stop"), health("stop")
    assert not any(few.check(chance, SOUND, 2.0 + n, n) for n in range(0, CHANCE_STEPS, 10))
    losses = [chance, chance, interval(6.0), chance, chance, chance]
    assert not any(pause.check(loss, SOUND, 2.0 + n, n * 1000) for n, loss in enumerate(losses))


def poison(monkeypatch, step: int) -> None:
    """Make an image of one step not finite, as a broken decoder might."""

    def loader(dataset, plan, steps, *arguments, **options):
        batches = train_loader(dataset, plan, steps, *arguments, **options)
        for number, (pixels, labels) in enumerate(batches, steps.start):
            changed = pixels.clone()
            changed[3, 0, 5, 5] += math.nan if number == step else 0.0
            yield changed, labels

    monkeypatch.setattr("pipeline.training.train_loader", loader)


def test_a_run_ends_at_a_bad_step_or_skips_it_if_told_to(packed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    poison(monkeypatch, 3)
    arguments = command(packed, out, "--epochs", "1", "--checkpoint-steps", "2")
    assert main(monkeypatch, arguments) == 1
    good = out / "checkpoints" / "step-000000002.pt"
    assert f"The last good checkpoint is {good}" in capsys.readouterr().err
    assert sorted(good.parent.glob("*.pt")) == [good]

    assert main(monkeypatch, [*arguments, "--on-nan", "skip"]) == 0
    assert "skipped 1 of the last 1 updates" in capsys.readouterr().out
    losses = [float(row["loss"]) for row in rows(out / "metrics.csv")]
    assert [step for step, loss in enumerate(losses) if not math.isfinite(loss)] == [3]
    assert len(losses) == 5
    state = torch.load(max(good.parent.glob("*.pt")), weights_only=True)
    assert all(weights.isfinite().all() for weights in state["model"].values())


def test_a_single_class_has_no_chance_level():
    """Its loss is exactly 0 from the beginning."""
    metrics = Metrics()
    health = Health(Settings(warmup_epochs=1), 1, lambda: None, metrics)
    for epoch in range(2, 10):
        assert health.check(interval(0.0), SOUND, float(epoch), epoch * CHANCE_STEPS) == []
    assert metrics.value("unsound_intervals_total", **CHANCE) == 0
