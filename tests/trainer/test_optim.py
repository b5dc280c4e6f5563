"""The update rule and the schedules, compared with scalar arithmetic and simulated curves."""

import pytest
import torch
from torch import nn

from trainer.optim import (
    learning_rate,
    make_optimizer,
    plateau_drops,
    set_learning_rate,
    unscheduled_rate,
)
from trainer.setting_sources import load_settings
from trainer.settings import Settings


def settings(**values) -> Settings:
    return Settings(**values)


class Layers(nn.Module):
    """A first and a later layer with one weight and one bias each."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Linear(1, 1)
        self.conv2 = nn.Linear(1, 1)
        self.double()


def rates_at(optimizer: torch.optim.SGD, run: Settings, epoch: float) -> list[float]:
    """Return ε of conv1's weights, conv1's biases, the other weights and the other biases."""
    set_learning_rate(optimizer, learning_rate(run, epoch, []), epoch, unscheduled_rate(run, epoch))
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("bias_schedule", ["weights", "constant"])
def test_the_update_is_the_papers_across_changes_of_the_learning_rate(bias_schedule):
    """Compare with v ← .9v − .0005·ε·w − ε·g, w ← w + v in plain floats; torch's own rule differs."""
    torch.manual_seed(0)
    model = Layers()
    run = settings(bias_learning_rate=2.0, bias_decay=False, bias_schedule=bias_schedule)
    optimizer = make_optimizer(model, run)
    expected = {name: [parameter.item(), 0.0] for name, parameter in model.named_parameters()}
    gradients = torch.randn(40, len(expected), dtype=torch.float64)
    for step, row in enumerate(gradients):
        rate = 0.01 if step < 15 else 0.001 if step < 30 else 0.004
        set_learning_rate(optimizer, rate, unscheduled=0.01)
        for parameter, gradient in zip(model.parameters(), row, strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
        for (name, value), gradient in zip(expected.items(), row.tolist(), strict=True):
            bias = name.endswith("bias")
            bias_rate = 0.02 if bias_schedule == "constant" else 2 * rate
            epsilon, decay = (bias_rate, 0.0) if bias else (rate, 0.0005)
            value[1] = 0.9 * value[1] - decay * epsilon * value[0] - epsilon * gradient
            value[0] += value[1]
    for name, parameter in model.named_parameters():
        assert parameter.item() == pytest.approx(expected[name][0], abs=1e-14), name


def test_the_first_layer_is_frozen_from_its_epoch_on():
    model = Layers()
    optimizer = make_optimizer(model, settings(freeze_conv1_epoch=72))
    for epoch, frozen in ((71.9, False), (72.0, True), (80.0, True)):
        before = {name: parameter.item() for name, parameter in model.named_parameters()}
        set_learning_rate(optimizer, 0.01, epoch)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert (parameter.item() == before[name]) == (frozen and name.startswith("conv1")), (epoch, name)


def test_a_layer_can_have_its_own_learning_rate():
    optimizer = make_optimizer(Layers(), settings(layer_learning_rates="conv2=0.25", bias_learning_rate=2.0))
    set_learning_rate(optimizer, 0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.02, 0.0025, 0.005])  # weight and bias of each layer


def test_the_learning_rate_of_a_layer_changes_at_its_epochs():
    changes = "conv2=0.5, conv2@7=0, conv2@2.5=0.25"
    optimizer = make_optimizer(Layers(), settings(layer_learning_rates=changes, bias_learning_rate=2.0))
    for epoch, rate in ((0, 0.005), (2.4, 0.005), (2.5, 0.0025), (6.9, 0.0025), (7, 0)):
        assert rates_at(optimizer, settings(), epoch) == pytest.approx([0.01, 0.02, rate, 2 * rate])


def test_the_rate_drops_when_the_error_stops_falling_but_at_most_three_times():
    falling = [0.9 - 0.05 * epoch for epoch in range(10)]
    assert [plateau_drops(falling[:n], 3) for n in range(10)] == [0] * 10
    stuck = [*falling, *[0.45] * 20]
    drops = [plateau_drops(stuck[:n], 3) for n in range(len(stuck) + 1)]
    assert drops.index(1) == 13  # the error fell for ten epochs, then not for three
    assert drops.index(2) == 16
    assert drops.index(3) == 19
    assert drops[-1] == 3


def test_a_lower_error_resets_the_patience():
    assert plateau_drops([0.5, 0.5, 0.5, 0.4, 0.4, 0.4], 3) == 0
    assert plateau_drops([0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4], 3) == 1


@pytest.mark.parametrize(
    ("epoch", "conv1", "others"),
    [
        (0, (1e-2, 2e-2), (1e-2, 2e-2)),
        (24.99, (1e-2, 2e-2), (1e-2, 2e-2)),
        (25, (1e-3, 2e-2), (1e-3, 2e-2)),
        (51, (1e-4, 2e-2), (1e-4, 2e-2)),
        (66.99, (1e-4, 2e-2), (1e-4, 2e-2)),
        (67, (1e-5, 2e-2), (1e-4, 2e-2)),
        (72, (0, 0), (1e-4, 2e-2)),
        (79, (0, 0), (1e-5, 2e-2)),
        (91, (0, 0), (1e-5, 2e-2)),
    ],
)
def test_the_rates_of_code2012_are_those_of_the_release(epoch, conv1, others):
    """The notes of layer-params-145.cfg (lines 169 to 181) applied by hand; its epsB is .02, in conv1 0."""
    run = load_settings(["--recipe", "code2012"])
    rates = rates_at(make_optimizer(Layers(), run), run, epoch)
    assert rates == pytest.approx([*conv1, *others], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "errors", "weights"),
    [("plateau", [0.5] * 9, 1e-3), ("steps", [], 1e-3), ("cosine", [], 0.005)],
)
def test_constant_biases_warm_up_but_ignore_every_schedule(schedule, errors, weights):
    options = {"schedule": schedule, "drop_epochs": (3,), "warmup_epochs": 2, "epochs": 10}
    run = settings(**options, patience=8, bias_schedule="constant", bias_learning_rate=2.0)
    optimizer = make_optimizer(Layers(), run)
    assert rates_at(optimizer, run, 0.5) == pytest.approx([0.0025, 0.005] * 2)
    set_learning_rate(optimizer, learning_rate(run, 6, errors), 6, unscheduled_rate(run, 6))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([weights, 0.02] * 2)


def test_the_plateau_schedule_gives_the_papers_rates():
    """Section 5: initialised at .01 and reduced three times by ten."""
    run = settings(schedule="plateau", patience=1)
    rates = [learning_rate(run, 50.0, [0.5] * n) for n in range(8)]
    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5, 1e-5, 1e-5, 1e-5])


def test_the_steps_schedule_follows_the_log_of_2012():
    run = settings(schedule="steps", drop_epochs=(25, 51, 79))
    epochs = (0.5, 24.9, 25, 50.9, 51, 78.9, 79, 91)
    expected = (1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5)
    assert [learning_rate(run, epoch, []) for epoch in epochs] == pytest.approx(expected)


@pytest.mark.parametrize(("rule", "peak"), [("fixed", 0.02), ("sqrt", 0.16), ("linear", 1.28)])
def test_the_learning_rate_follows_the_batch_by_the_rule(rule, peak):
    """From 128 to 8,192 the batch grows 64 times, and its root 8 times."""
    base = {} if rule == "fixed" else {"base_batch": 128}
    options = {"schedule": "cosine", "learning_rate": 0.02, "warmup_epochs": 4, "epochs": 12}
    run = settings(**options, rate_rule=rule, batch=8192, **base)
    rates = [learning_rate(run, epoch, []) for epoch in (1, 4, 8, 12)]
    assert rates == pytest.approx([peak / 4, peak, peak / 2, 0.0])
    assert unscheduled_rate(run, 8) == pytest.approx(peak)


def test_warm_up_is_linear_and_cosine_ends_at_zero():
    run = settings(schedule="cosine", learning_rate=0.4, warmup_epochs=2, epochs=10)
    assert [learning_rate(run, epoch, []) for epoch in (0.5, 1.0, 2.0, 6.0, 10.0)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.2, 0.0]
    )


def test_a_layer_that_is_no_longer_frozen_begins_without_velocity():
    """v ← .9v − ε·g is 0 after steps with ε = 0, however large the gradients were."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD(
        [{"params": [weight], "factors": ((0, 0.0), (5, 1.0))}], lr=0.01, momentum=0.9
    )
    for epoch in range(10):
        set_learning_rate(optimizer, 0.01, epoch)
        weight.grad = torch.ones(1)
        before = weight.item()
        optimizer.step()
        if epoch == 5:
            assert weight.item() - before == pytest.approx(-0.01)
    assert weight.item() < -0.1
