"""A training step: its loss and gradients in each precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.optim import make_optimizer, set_learning_rate
from trainer.settings import Settings
from trainer.step import Condition, Skips, Step, all_finite, state_of

CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8), torch.randint(5, (6,))


def test_fp32_step_is_one_update_by_the_mean_gradient(batch):
    model, reference = tiny(), tiny()
    loss, wrong = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp32", CPU)(*batch)
    expected = F.cross_entropy(reference(batch[0]), batch[1])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert wrong == (reference(batch[0]).argmax(1) != batch[1]).sum()
    for parameter, before in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), (before - 0.1 * before.grad).detach())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close_to_fp32(batch, precision):
    model, reference = tiny(), tiny()
    loss, _ = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), precision, CPU)(*batch)
    expected, _ = Step(reference, torch.optim.SGD(reference.parameters(), lr=0.1), "fp32", CPU)(*batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    for parameter, exact in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, exact, rtol=0, atol=3e-3)


def test_an_overflowing_fp16_step_changes_no_weight_and_halves_the_scale(batch):
    model = tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16", CPU)
    scale = step.scaler.get_scale()
    step(batch[0] * 1e5, batch[1])  # beyond fp16's maximum of 65504
    assert step.scaler.get_scale() == scale / 2
    assert Condition.of(step.take_condition().tolist()).skips == Skips(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def trained(batches, precision: str) -> tuple[list[torch.Tensor], Skips]:
    """Return the weights and velocities after some steps, and the skips among them."""
    model = tiny()
    optimizer = make_optimizer(model, Settings())
    step = Step(model, optimizer, precision, CPU, skip_not_finite=True)
    set_learning_rate(optimizer, 0.1)
    for pixels, labels in batches:
        step(pixels, labels)
    velocities = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    weights = [parameter.detach() for parameter in model.parameters()]
    return weights + velocities, Condition.of(step.take_condition().tolist()).skips


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_has_no_effect(batch, precision, position, value):
    bad = batch[0].clone()
    bad[2, 1, 3, 3] = value
    good = [batch, (batch[0].flip(0), batch[1])]
    expected, none = trained(good, precision)
    found, skips = trained([*good[:position], (bad, batch[1]), *good[position:]], precision)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert none == Skips(0, 0)
    assert skips == Skips(1, int(position == 2))


def test_an_overflow_in_the_first_fp16_step_leaves_nothing_in_the_velocities(batch):
    """torch's fused SGD would otherwise continue from uninitialised memory."""
    found, _ = trained([(batch[0] * 1e5, batch[1]), batch], "fp16")
    expected, _ = trained([batch], "fp16")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(1,), (7,), (1000, 33), (5, 3, 4, 4)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_that_is_not_finite_is_found_at_any_position(shape, value):
    size = torch.Size(shape).numel()
    for position in {0, size // 2, size - 1}:
        tensor = torch.randn(shape)
        tensor.view(-1)[position] = value
        if len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        assert not all_finite([torch.ones(3), tensor, torch.ones(())])


def test_finite_values_are_finite_even_if_their_sum_is_not():
    assert all_finite([torch.full((1000,), 3e38), torch.full((1000,), -3e38), torch.zeros(1)])


def test_skips_in_fp16_are_counted_even_if_the_scale_grows_again(batch):
    model = tiny()
    step = Step(model, torch.optim.SGD(model.parameters(), lr=1e-4), "fp16", CPU)
    step.scaler.set_growth_interval(1)
    pixels, labels = batch
    for factor in (1e5, 1.0, 1e5, 1e5, 1.0):
        step(pixels * factor, labels)
    assert Condition.of(step.take_condition().tolist()).skips == Skips(3, 0)


def test_a_buffer_that_was_never_finite_need_not_become_so():
    model = tiny()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    model.register_buffer("mean", torch.zeros(2))
    watched = state_of(model)
    assert {id(value) for value in watched} == {id(value) for value in (*model.parameters(), model.mean)}
    assert all_finite(watched)
    model.mean.fill_(torch.nan)
    assert not all_finite(watched)


def test_updates_can_be_skipped_in_a_net_with_an_empty_weight(batch):
    model, empty = tiny(), torch.zeros(0, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), empty], lr=0.1, fused=True)
    step = Step(lambda x: model(x) + empty.sum(), optimizer, "fp32", CPU, True, state_of(model))
    step(*batch)
    assert Condition.of(step.take_condition().tolist()).skips == Skips(0, 0)
