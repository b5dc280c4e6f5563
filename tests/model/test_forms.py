"""Each form of the convolutions computes the same as the grouped layers, forward and backward."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import PRESETS, AlexNet, Variant
from model.forms import FORMS

OTHERS = [form for form in FORMS if form != "grouped"]
VARIANTS = {
    "a quarter of the width": Variant(width=0.25),
    "one kernel per tower": Variant(width=1e-9),
    "an odd number of kernels": Variant(width=0.065),
    "no LRN": Variant(width=0.25, lrn=False),
    "CNN*": Variant(width=0.25, conv6=True),
    "one tower": Variant(width=0.25, towers=1),
    **{f"without {name}": Variant(width=0.25, without=name) for name in ("conv2", "conv3", "conv4", "conv5")},
}
ROUNDING = 2e-13  # relative to the largest value; fp64 has 2e-16, and thousands of terms are added


def net(form: str, preset: str, variant: Variant, crop: int = 96, dtype=torch.float64) -> AlexNet:
    torch.manual_seed(0)
    net = AlexNet(10, preset, "off", crop, variant, form)
    return net.to(dtype).to(memory_format=torch.channels_last)


def passed(form: str, preset: str, variant: Variant, crop: int = 96) -> dict[str, Tensor]:
    """Return the logits, and the gradients of pixels and parameters."""
    model, generator = net(form, preset, variant, crop), torch.Generator().manual_seed(1)
    pixels = 255 * torch.rand(3, 3, crop, crop, generator=generator, dtype=torch.float64) - 127.5
    pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = model(pixels)
    F.cross_entropy(logits, torch.tensor([3, 1, 4])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "pixels": pixels.grad, **gradients}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(
            ours[name], values, rtol=0, atol=ROUNDING * float(values.abs().max()), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_forms_are_equal_forward_and_backward(variant, preset):
    expected = passed("grouped", preset, variant)
    for form in OTHERS:
        assert_equal(passed(form, preset, variant), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_forms_are_equal_if_kernels_add_the_biases(preset, monkeypatch):
    expected = passed("grouped", preset, Variant(width=0.25))
    monkeypatch.setattr("model.alexnet.fuses_bias", lambda *options: True)
    for form in FORMS:
        assert_equal(passed(form, preset, Variant(width=0.25)), expected)


@pytest.mark.parametrize("crop", [64, 65, 66, 67, 224])
def test_blocks_of_pixels_fit_any_crop(crop):
    variant = Variant(width=0.125)
    expected = passed("grouped", "code2012", variant, crop)
    assert_equal(passed("grouped-s2d", "code2012", variant, crop), expected)
    assert_equal(passed("towers-s2d", "code2012", variant, crop), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_fits_all_forms(preset):
    states = [net(form, preset, Variant(width=0.125)).state_dict() for form in FORMS]
    for state in states:
        assert list(state) == list(states[0])
        assert all(map(torch.equal, state.values(), states[0].values()))


@pytest.fixture
def convolutions(monkeypatch) -> list[tuple[Tensor, Tensor, int]]:
    """Record the input, weight and groups of each convolution that is computed."""
    seen, conv2d = [], F.conv2d

    def observed(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        seen.append((x, weight, groups))
        return conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(F, "conv2d", observed)
    return seen


@pytest.mark.parametrize(
    ("form", "preset", "kernels"),
    [
        ("grouped", "code2012", [(24, 11, 1), (64, 5, 2), (96, 3, 1), (96, 3, 2), (64, 3, 2)]),
        ("block-diagonal-s2d", "paper", [(24, 3, 1), (64, 5, 1), (96, 3, 1), (96, 3, 1), (64, 3, 1)]),
        # Two per layer, except for the paper preset's conv1, whose normalisation spans both towers.
        ("towers", "code2012", 2 * [(12, 11, 1)] + [(32, 5, 1)] * 2 + [(48, 3, 1)] * 4 + [(32, 3, 1)] * 2),
        ("towers", "paper", [(24, 11, 1)] + [(32, 5, 1)] * 2 + [(48, 3, 1)] * 4 + [(32, 3, 1)] * 2),
    ],
)
def test_a_form_computes_the_convolutions_of_its_name(form, preset, kernels, convolutions):
    net(form, preset, Variant(width=0.25))(torch.zeros(2, 3, 96, 96, dtype=torch.float64))
    assert [(len(weight), weight.shape[-1], groups) for _, weight, groups in convolutions] == kernels


@pytest.mark.parametrize("form", FORMS)
def test_every_form_uses_channels_last(form, convolutions):
    x = torch.zeros(2, 3, 96, 96, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    net(form, "code2012", Variant(width=0.25))(x)
    for tensors in convolutions:
        for tensor in tensors[:2]:
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("preset", "cut"), [("code2012", []), ("paper", [1, 2])])
def test_towers_are_only_split_where_they_were_joined(preset, cut, convolutions):
    """In the net of the paper's text, the two inputs of conv2 are halves of the normalisation's output."""
    net("towers", preset, Variant(width=0.25))(torch.zeros(2, 3, 96, 96, dtype=torch.float64))
    views = [x.untyped_storage().nbytes() > x.numel() * x.element_size() for x, *_ in convolutions]
    assert [number for number, view in enumerate(views) if view] == cut


@pytest.mark.parametrize(
    ("form", "preset"), [("towers-s2d", "code2012"), ("towers", "paper"), ("block-diagonal-s2d", "paper")]
)
def test_a_form_is_one_graph(form, preset):
    torch.compiler.reset()
    model = net(form, preset, Variant(width=0.125), dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_net_of_one_tower_has_no_groups():
    for form, expected in (("towers-s2d", "grouped-s2d"), ("block-diagonal", "grouped")):
        variant = replace(VARIANTS["one tower"], width=0.125)
        assert net(form, "paper", variant).form == FORMS[expected]
