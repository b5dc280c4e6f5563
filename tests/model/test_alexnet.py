"""The net compared with the paper's numbers, and with a second forward pass written with torch's layers."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import PRESETS, AlexNet, Variant, count_macs, count_parameters

PARAMETERS = {
    "conv1": 34_944,
    "conv2": 307_456,
    "conv3": 885_120,
    "conv4": 663_936,
    "conv5": 442_624,
    "fc6": 37_752_832,
    "fc7": 16_781_312,
    "fc8": 4_097_000,
}
MAPS = {  # for a crop of 224 px
    "conv1": [(96, 55, 55)],
    "conv2": [(256, 27, 27)],
    "conv3": [(384, 13, 13)],
    "conv4": [(384, 13, 13)],
    "conv5": [(256, 13, 13)],
    "pool": [(256, 6, 6)],
}
POOLED = {"conv2": (96, 27, 27), "conv3": (256, 13, 13)}  # inputs of these layers
VARIANTS = {
    "tanh": Variant(activation="tanh"),
    "no LRN": Variant(lrn=False),
    "non-overlapping pooling": Variant(overlapping_pooling=False),
    "released pooling": Variant(overlapping_pooling=False, released_pooling=True),
    "one tower": Variant(towers=1),
    "CNN*": Variant(conv6=True),
    **{f"without {name}": Variant(without=name) for name in ("conv2", "conv3", "conv4", "conv5")},
}
BIAS_ONE = ("conv2", "conv4", "conv5", "fc6", "fc7")


def meta_net(**options) -> AlexNet:
    """Return a net on the meta device, which has shapes but no values."""
    with torch.device("meta"):
        return AlexNet(**options)


def some_pixels(count: int, crop: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return smooth images of random colours from 0 to 255, minus 127.5, in channels_last."""
    coarse = 255 * torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(1)) - 127.5
    pixels = F.interpolate(coarse, crop, mode="bilinear").to(dtype)
    return pixels.contiguous(memory_format=torch.channels_last)


@contextmanager
def recorded(net: nn.Module, *names: str) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record the inputs and outputs of the named layers in the forward passes within, in order."""
    seen, hooks = defaultdict(list), []
    for name in names:

        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            seen[name].append((inputs[0], output))

        hooks.append(net.get_submodule(name).register_forward_hook(hook))
    yield seen
    for handle in hooks:
        handle.remove()


@pytest.fixture(scope="module", params=PRESETS)
def net(request: pytest.FixtureRequest) -> AlexNet:
    """The net at full width before training, without dropout."""
    torch.manual_seed(0)
    return AlexNet(preset=request.param, dropout="off").to(memory_format=torch.channels_last)


def net_of_96_px(preset: str, variant: Variant) -> AlexNet:
    """Return a net in fp64 whose maps of pool5 have 2×2 values, so that their order into fc6 matters.

    A crop of 96 px needs a padding of 3, as 224 px does, and the pooling windows cover every map completely.
    """
    torch.manual_seed(0)
    net = AlexNet(10, preset, crop=96, variant=variant)
    return net.to(torch.float64, memory_format=torch.channels_last).eval()


@pytest.fixture(params=PRESETS)
def small(request: pytest.FixtureRequest) -> AlexNet:
    return net_of_96_px(request.param, Variant(width=0.25))


def test_each_layer_has_the_published_number_of_parameters(net):
    layers = {name: count_parameters(layer) for name, layer in net.named_children()}
    assert {name: count for name, count in layers.items() if count} == PARAMETERS
    assert count_parameters(net) == sum(PARAMETERS.values()) == 60_965_224


def test_multiply_accumulates_are_counted_without_side_effects(net):
    state = torch.random.get_rng_state()
    assert count_macs(net) == 724_406_816
    assert net.conv1.weight.device.type == "cpu"
    assert not net.conv1._forward_hooks
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("preset", PRESETS)
def test_maps_have_the_published_sizes(preset):
    net = meta_net(preset=preset)
    with recorded(net, *MAPS, "fc6") as seen:
        assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert {name: [tuple(output.shape[1:]) for _, output in seen[name]] for name in MAPS} == MAPS
    assert {name: tuple(seen[name][0][0].shape[1:]) for name in POOLED} == POOLED
    assert seen["fc6"][0][0].shape == (2, 9216)


def test_pooling_without_overlap_has_the_map_sizes_of_the_release():
    """By hand from layers-147.cfg: 1 + ⌈(2·padding + side − kernel) / stride⌉ windows (layer.py)."""
    net = meta_net(preset="code2012", variant=VARIANTS["released pooling"])
    with recorded(net, "conv1", "conv2", "conv3", "conv4", "conv5", "pool") as seen:
        net(torch.empty(2, 3, 224, 224, device="meta"))
    sides = {name: tuple(part.shape[-1] for part in calls[0]) for name, calls in seen.items()}
    assert sides == {
        "conv1": (227, 55),  # with the zeros on the right and bottom
        "conv2": (28, 26),
        "conv3": (13, 13),
        "conv4": (13, 13),
        "conv5": (13, 11),
        "pool": (11, 6),
    }
    # The partial sums of layers-147.cfg divide its numbers of windows.
    assert (55**2 % 5, 26**2 % 4, 13**2 % 13, 11**2 % 11) == (0, 0, 0, 0)


def test_released_pooling_changes_only_a_net_without_overlapping_pooling():
    net = meta_net(variant=Variant(released_pooling=True))
    assert count_macs(net) == 724_406_816


@pytest.mark.parametrize("crop", [64, 65, 66, 67, 96, 112, 128, 227])
@pytest.mark.parametrize("without", ["none", "conv2", "conv5"])
def test_released_pooling_takes_other_crops_and_nets(crop, without):
    variant = Variant(overlapping_pooling=False, released_pooling=True, without=without)
    assert meta_net(classes=16, crop=crop, variant=variant)(
        torch.empty(2, 3, crop, crop, device="meta")
    ).shape == (2, 16)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [(Variant(), 60_965_224), (VARIANTS["one tower"], 59_798_312), (VARIANTS["CNN*"], 61_555_304)],
)
def test_parameters_of_the_nets_that_the_paper_compares(variant, parameters):
    assert count_parameters(meta_net(variant=variant)) == parameters


def test_a_width_scales_the_kernels_and_units_of_each_layer_but_not_the_classes():
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
    half = meta_net(variant=Variant(width=0.5))
    assert [len(half.get_parameter(f"{layer}.bias")) for layer in layers] == [
        *(48, 128, 192, 192, 128),
        *(2048, 2048, 1000),
    ]
    assert half(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("width", [1e-9, 0.013, 0.0625, 1.37])
@pytest.mark.parametrize("towers", [1, 2])
def test_any_width_makes_a_net_that_learns(width, towers):
    net = AlexNet(10, "code2012", crop=67, variant=Variant(width=width, towers=towers, conv6=True))
    net(some_pixels(2, 67, torch.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["conv2", "conv3", "conv4", "conv5"])
def test_an_omitted_convolution_is_absent(name):
    net = meta_net(variant=Variant(without=name))
    assert not hasattr(net, name)
    assert count_macs(net) < count_macs(meta_net())


@pytest.mark.parametrize("crop", [64, 67, 96, 112, 128, 160, 224, 227])
def test_other_crops_give_logits(crop):
    assert meta_net(classes=16, crop=crop)(torch.empty(2, 3, crop, crop, device="meta")).shape == (2, 16)


@pytest.mark.parametrize("crop", [1, 32, 63])
def test_a_crop_that_is_too_small_is_refused(crop):
    with pytest.raises(ValueError, match=f"crop of {crop} px is too small"):
        meta_net(crop=crop)


def test_conv1_is_padded_only_on_the_right_and_bottom(net):
    x = some_pixels(1, 224, torch.float32)
    with torch.inference_mode(), recorded(net, "conv1") as seen:
        net(x)
        ours, weight, bias = seen["conv1"][0][1], net.conv1.weight, net.conv1.bias
        # Without padding, 54 windows fit, which are the first 54 of 55.
        torch.testing.assert_close(
            ours[..., :54, :54], F.conv2d(x, weight, bias, stride=4), rtol=1e-4, atol=1e-4
        )
        # The last window begins at pixel 4·54 and contains the 8 remaining pixels.
        corner = (weight[..., :8, :8] * x[..., 216:, 216:]).sum((1, 2, 3)) + bias
        torch.testing.assert_close(ours[0, :, 54, 54], corner, rtol=1e-4, atol=1e-4)


def test_pixels_at_the_right_and_bottom_edge_matter(small):
    x = some_pixels(2, 96).requires_grad_()
    gradient = torch.autograd.grad(small(x).sum(), x)[0]
    assert gradient[..., -1].all()
    assert gradient[..., -1, :].all()


def test_initial_weights_are_normal(net, request):
    conv345 = {"paper": 0.01, "code2012": 0.03}[request.node.callspec.params["net"]]
    for name in PARAMETERS:
        layer = net.get_submodule(name)
        n, std = layer.weight.numel(), conv345 if name in ("conv3", "conv4", "conv5") else 0.01
        # Five standard errors of the mean, of the standard deviation and of the share within one.
        assert abs(layer.weight.mean()) < 5 * std / math.sqrt(n), name
        assert abs(layer.weight.std() - std) < 5 * std / math.sqrt(2 * n), name
        share = (layer.weight.abs() < std).float().mean().item()
        assert abs(share - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.683 * 0.317 / n), name
        assert (layer.bias == float(name in BIAS_ONE)).all(), name


def test_biases_may_begin_at_zero_with_the_same_weights():
    nets = []
    for biases in ("paper", "zeros"):
        torch.manual_seed(0)
        nets.append(AlexNet(10, crop=64, variant=Variant(width=0.25, initial_biases=biases)).state_dict())
    for name, values in nets[1].items():
        assert torch.equal(values, torch.zeros_like(values) if "bias" in name else nets[0][name])


def test_initial_logits_differ_between_images(net, request):
    with torch.inference_mode():
        spread = net(some_pixels(8, 224, torch.float32)).std(0).mean().item()
    if request.node.callspec.params["net"] == "code2012":
        assert spread >= 0.05
    else:
        assert 0.003 < spread < 0.03  # three layers have weights a third as large


@pytest.mark.parametrize("preset", ["paper", "code2012"])
def test_the_initial_logits_of_a_narrow_net_vary_as_much_as_those_of_the_whole_net(preset):
    torch.manual_seed(0)
    spreads = []
    for width in (1.0, 0.25):
        net = AlexNet(100, preset, "off", crop=112, variant=Variant(width=width)).eval()
        with torch.inference_mode():
            spreads.append(net(some_pixels(8, 112, torch.float32)).std(0).mean().item())
    assert 0.5 < spreads[1] / spreads[0] < 2


def reference_logits(net: AlexNet, x: Tensor, preset: str) -> Tensor:
    """Compute the forward pass with torch's own layers and two explicit towers."""
    variant, towers, narrower = net.variant, net.variant.towers, int(net.variant.released_pooling)

    def activation(x: Tensor) -> Tensor:
        return x.relu() if variant.activation == "relu" else x.tanh()

    def convolve(name: str, x: Tensor, groups: int = 1, **options) -> Tensor:
        layer = net.get_submodule(name)
        parts = zip(x.chunk(groups, 1), layer.weight.chunk(groups), layer.bias.chunk(groups), strict=True)
        return torch.cat([F.conv2d(a, weight, bias, **options) for a, weight, bias in parts], 1)

    def normalise(x: Tensor) -> Tensor:
        if not variant.lrn:
            return x
        if preset == "paper":
            return F.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
        return torch.cat(
            [F.local_response_norm(a, 5, alpha=1e-4, beta=0.75, k=2.0) for a in x.chunk(towers, 1)], 1
        )

    def pool(x: Tensor) -> Tensor:
        if not variant.released_pooling:
            return F.max_pool2d(x, 3 if variant.overlapping_pooling else 2, 2)
        # A window that reaches beyond the maps has fewer pixels.
        return F.max_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-math.inf), 2, 2)

    x = convolve("conv1", F.pad(x, (0, (11 - x.shape[3]) % 4, 0, (11 - x.shape[2]) % 4)), stride=4)
    x = pool(normalise(activation(x))) if preset == "paper" else activation(pool(normalise(x)))
    if variant.without != "conv2":
        x = normalise(activation(convolve("conv2", x, groups=towers, padding=2 - narrower)))
        if preset == "code2012" and variant.lrn:
            ones = x.new_ones(x.shape[1], 1, 5, 5)
            x = x / (1 + 0.001 / 25 * F.conv2d(x**2, ones, padding=2, groups=len(ones))) ** 0.75
    x = pool(x)
    for name, groups, padding in (("conv3", 1, 1), ("conv4", towers, 1), ("conv5", towers, 1 - narrower)):
        if name != variant.without:
            x = activation(convolve(name, x, groups=groups, padding=padding))
    x = pool(x)
    if variant.conv6:
        x = activation(convolve("conv6", x, padding=1))
    x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
    x = activation(F.linear(x, net.fc6.weight, net.fc6.bias)) / 2
    x = activation(F.linear(x, net.fc7.weight, net.fc7.bias)) / 2
    return F.linear(x, net.fc8.weight, net.fc8.bias)


NARROW = {name: dataclasses.replace(variant, width=0.25) for name, variant in VARIANTS.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", [Variant(), *NARROW.values()], ids=["as published", *NARROW])
def test_logits_equal_those_of_torchs_own_layers_in_two_towers(variant, preset):
    net, x = net_of_96_px(preset, variant), some_pixels(2, 96)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), reference_logits(net, x, preset), rtol=1e-9, atol=1e-9)


def test_the_result_is_the_same_if_kernels_add_the_biases(small, monkeypatch):
    x = some_pixels(2, 96)
    expected = small(x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(small.parameters()))
    monkeypatch.setattr("model.alexnet.fuses_bias", lambda *options: True)
    with recorded(small, "conv1", "conv2") as seen:
        logits = small(x)
    assert not seen  # no layer was called with its own bias
    gradients = torch.autograd.grad(logits.square().sum(), list(small.parameters()))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_channels_last_is_never_copied_back(small):
    with recorded(small, "conv1", "conv2", "conv3", "conv4", "conv5", "pool", "fc6") as seen:
        small(some_pixels(2, 96))
    flat = seen.pop("fc6")[0][0]
    for name, calls in seen.items():
        for tensor in (t for call in calls for t in call):
            assert tensor.is_contiguous(memory_format=torch.channels_last), name
            assert not tensor.is_contiguous(), name
    pool5 = seen["pool"][0][1]
    assert flat.data_ptr() == pool5.data_ptr()
    assert torch.equal(flat, pool5.permute(0, 2, 3, 1).flatten(1))
