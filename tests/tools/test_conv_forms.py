"""Other forms of the convolutions compute what the net's own layers do."""

import pytest
import torch

from model.alexnet import AlexNet
from tools.benchmarks.conv_forms import LAYERS, form_work

FORMS = [(layer, form) for layer, about in LAYERS.items() for form in about.forms]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return AlexNet(classes=10).double()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_form_equals_the_nets_own_layer_forward_and_backward(net, name, form):
    layer, own = LAYERS[name], getattr(net, name)
    assert tuple(own.weight.shape) == layer.weight
    channels, side = layer.input
    x = torch.randn(2, channels, side, side, dtype=torch.float64, requires_grad=True)
    wanted = [x, own.weight, own.bias]
    expected = own(x)
    y = layer.forms[form](x, own.weight, own.bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, wanted, grad) for output in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


def test_the_inputs_are_those_of_the_net_at_224_px(net):
    seen = {}

    def note(layer, inputs, _output):
        seen[layer] = tuple(inputs[0].shape[1:3])

    hooks = [getattr(net, name).register_forward_hook(note) for name in LAYERS]
    net(torch.zeros(1, 3, 224, 224, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    for name, layer in LAYERS.items():
        assert seen[getattr(net, name)] == layer.input


def test_work_returns_its_images():
    assert form_work(LAYERS["conv4"], LAYERS["conv4"].forms["towers"], 2, "fp32", torch.device("cpu"))() == 2
