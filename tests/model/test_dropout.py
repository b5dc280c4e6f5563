"""Dropout as in 2012 and as it is common today, on its own and in the net."""

import math

import pytest
import torch

from model.alexnet import DROPOUTS, AlexNet

KEPT = {"2012": 1.0, "inverted": 2.0}  # factor on a kept unit during training
TESTED = {"2012": 0.5, "inverted": 1.0, "off": 1.0}  # factor on all units at test time


@pytest.mark.parametrize("kind", KEPT)
def test_training_zeroes_half_of_the_units(kind):
    torch.manual_seed(0)
    x = torch.rand(100, 1000) + 1
    y = DROPOUTS[kind]().train()(x)
    kept = y != 0
    assert torch.equal(y[kept], KEPT[kind] * x[kept])
    assert abs(kept.float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(x.numel())  # five standard errors


@pytest.mark.parametrize("kind", KEPT)
def test_each_image_and_each_step_has_its_own_mask(kind):
    torch.manual_seed(0)
    layer, x = DROPOUTS[kind]().train(), torch.ones(2, 1000)
    first, second = layer(x), layer(x)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KEPT)
def test_the_gradient_flows_through_the_kept_units(kind):
    torch.manual_seed(0)
    x = torch.rand(10, 100).add(1).requires_grad_()
    y = DROPOUTS[kind]().train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * KEPT[kind])


@pytest.mark.parametrize("kind", TESTED)
def test_evaluation_is_exact(kind):
    x = torch.randn(10, 100)
    assert torch.equal(DROPOUTS[kind]().eval()(x), TESTED[kind] * x)


def test_off_changes_nothing_in_training():
    x = torch.randn(10, 100)
    assert torch.equal(DROPOUTS["off"]().train()(x), x)


def test_dropout_acts_on_the_outputs_of_fc6_and_fc7():
    torch.manual_seed(0)
    net = AlexNet(classes=10, crop=67).train()
    seen = []
    for layer in (net.fc6, net.drop6, net.fc7, net.drop7, net.fc8):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output)))
    net(torch.randn(2, 3, 67, 67))
    (fc6, drop6, fc7, drop7, fc8) = seen
    assert [layer for layer, *_ in seen] == [net.fc6, net.drop6, net.fc7, net.drop7, net.fc8]
    for before, dropout, after in ((fc6, drop6, fc7), (fc7, drop7, fc8)):
        assert torch.equal(dropout[1], before[2].relu())
        assert torch.equal(after[1], dropout[2])
