"""Define AlexNet as published in 2012: five convolutions and three fully connected layers in two towers.

Two presets, because the paper's text and the code behind its numbers differ:

- `paper`     the text (sections 3.3 to 3.5 and 5): ReLU, then local response normalisation over
              all channels with α = 1e-4 on the sum; every weight from N(0, .01²).
- `code2012`  layers-145.cfg of the published source: α is divided by the window's size, windows end
              at the tower's edge, the first normalisation comes before its ReLU, a 5×5 normalisation
              within each map follows the second one, and conv3 to conv5 are from N(0, .03²).

Both have 60,965,224 parameters and 724,406,816 multiply-accumulates at 224 px and 1000 classes.

The implementation differs from both in two ways. It uses one device instead of two: grouped
convolutions compute what the two towers did (model/towers.py uses two devices). And it flattens the
last maps in HWC order, which lets channels_last maps reach fc6 without a copy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.forms import FORMS, Maps, convolve, convolve_pixels, joined
from model.fused import Activation, fuses_bias, normalise_and_pool


@dataclass(frozen=True)
class Preset:
    """The choices in which the paper's text and code differ."""

    lrn_alpha: float  # factor on the sum of squares
    lrn_towers: int  # number of parts of the channels that are normalised separately
    lrn1_before_relu: bool
    spatial_norm: bool  # whether a normalisation within each map follows the second one
    conv345_std: float  # standard deviation of the initial weights of conv3 to conv5


PRESETS = {
    "paper": Preset(1e-4, lrn_towers=1, lrn1_before_relu=False, spatial_norm=False, conv345_std=0.01),
    "code2012": Preset(1e-4 / 5, lrn_towers=2, lrn1_before_relu=True, spatial_norm=True, conv345_std=0.03),
}


@dataclass(frozen=True)
class Variant:
    """Changes to the net, as in the paper's experiments; the default is the net without changes.

    activation: a key of ACTIVATIONS (section 3.1). lrn: whether responses are normalised (3.3).
    overlapping_pooling: whether pooling windows are 3 or 2 pixels wide, with a stride of 2 (3.4).
    towers: 2, or 1 for the net that the paper trained on one GPU, with half of each convolution but the
    last and 59,798,312 parameters (3.2). conv6: whether a sixth convolution follows the last pooling
    layer, as in the net called CNN* with 61,555,304 parameters (6.1). without: a convolution from conv2
    to conv5 to leave out, together with its activation and normalisation, or "none" (7). width: factor on
    the paper's number of kernels and units in each layer but fc8; the numbers are rounded for each tower, and
    are at least one. This factor is not from the paper. released_pooling: whether pooling windows of 2 pixels
    come with the sizes of layers-147.cfg, whose conv2 and conv5 have one pixel less of padding, and whose
    number of windows is rounded up; maps of 224 px are then 55, 28, 26, 13, 11 and 6. initial_biases: `paper`
    for ones in some layers (section 5), or `zeros`.
    """

    activation: str = "relu"
    lrn: bool = True
    overlapping_pooling: bool = True
    towers: int = 2
    conv6: bool = False
    without: str = "none"
    width: float = 1.0
    released_pooling: bool = False
    initial_biases: str = "paper"


ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "tanh": torch.tanh}


class Dropout2012(nn.Module):
    """Dropout as in section 4.2: units are 0 with probability .5 in training, and halved at test time."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(0.5) if self.training else x * 0.5


DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "2012": Dropout2012,
    "inverted": lambda: nn.Dropout(0.5),
    "off": nn.Identity,
}


class AlexNet(nn.Module):
    """The net, with weights drawn from torch's global generator.

    classes: number of outputs of fc8. preset: a key of PRESETS. dropout: `2012`, `inverted` (as in most
    frameworks today: doubled during training, unchanged at test time) or `off`. crop: side of the square
    input in pixels; 224 in the paper, and at least 64. variant: changes to the net. form: a key of FORMS,
    which says how to compute the convolutions; a net of one tower has no groups, so only -s2d matters.
    Raises ValueError if the crop is too small.

    Input: [N,3,crop,crop] on the raw 0–255 scale, minus the mean. With these small initial weights,
    dividing by a standard deviation as well makes the first logits 30 to 40 times smaller, and the loss
    may then never leave ln(classes).
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv6: nn.Conv2d

    def __init__(
        self,
        classes: int = 1000,
        preset: str = "paper",
        dropout: str = "2012",
        crop: int = 224,
        variant: Variant = Variant(),
        form: str = "grouped",
    ):
        super().__init__()
        self.preset, self.variant = PRESETS[preset], variant
        self.form = FORMS[form] if variant.towers == 2 else FORMS[form]._replace(groups="grouped")
        # The normalisation of the paper's text spans both towers, so their maps must be joined for it.
        self.normalises_across = variant.lrn and self.preset.lrn_towers == 1
        self.lrn_alpha = self.preset.lrn_alpha if variant.lrn else None
        self.activation: Activation = ACTIVATIONS[variant.activation]
        self.window = 3 if variant.overlapping_pooling else 2
        # The 2012 code rounds the number of windows up, so it pads with zeros on the right and bottom.
        self.conv1_pad = (11 - crop) % 4
        side = (crop + self.conv1_pad - 11) // 4 + 1  # of the maps, after conv1 and after each pooling
        self.round_up = variant.released_pooling and not variant.overlapping_pooling
        narrower = {"conv2", "conv5"} - {variant.without} if self.round_up else set()
        for name in ("conv1", "conv2", "conv5"):
            side -= 2 * (name in narrower)
            side = (side - self.window + self.round_up) // 2 + 1
        if side < 1:
            raise ValueError(f"a crop of {crop} px is too small for AlexNet; use at least 64")

        def scaled(kernels: int) -> int:
            return max(1, round(variant.width * kernels))

        channels = 3
        towers = variant.towers
        for name, kernels, kernel_size, stride, groups in (
            ("conv1", scaled(48) * towers, 11, 4, 1),
            ("conv2", scaled(128) * towers, 5, 1, towers),
            ("conv3", scaled(192) * towers, 3, 1, 1),
            ("conv4", scaled(192) * towers, 3, 1, towers),
            ("conv5", 2 * scaled(128), 3, 1, towers),
            ("conv6", 2 * scaled(128), 3, 1, 1),
        ):
            if name != variant.without and (name != "conv6" or variant.conv6):
                padding = 0 if name == "conv1" else kernel_size // 2 - (name in narrower)
                layer = nn.Conv2d(channels, kernels, kernel_size, stride, padding, groups=groups)
                self.add_module(name, layer)
                channels = kernels
        units = 2 * scaled(2048)
        self.fc6 = nn.Linear(channels * side * side, units)
        self.fc7 = nn.Linear(units, units)
        self.fc8 = nn.Linear(units, classes)
        self.drop6 = DROPOUTS[dropout]()
        self.drop7 = DROPOUTS[dropout]()
        self.pool = nn.MaxPool2d(self.window, stride=2, ceil_mode=self.round_up)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in section 5: weights are normally distributed, and biases are 0 or 1.

        If the net is not as wide as in the paper, weights are divided by the root of the width in all layers
        whose number of inputs depends on it, so that their outputs vary as much as in the paper's net.
        """
        stds = dict.fromkeys(("conv3", "conv4", "conv5"), self.preset.conv345_std) | {"conv6": 0.03}
        ones = {"conv2", "conv4", "conv5", "conv6", "fc6", "fc7"}
        # With biases of 1, tanh would start near saturation.
        if self.variant.initial_biases == "zeros" or self.variant.activation != "relu":
            ones = set()
        for name, layer in self.named_children():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                scale = 1.0 if name == "conv1" else self.variant.width**-0.5
                nn.init.normal_(layer.weight, std=scale * stds.get(name, 0.01))
                assert layer.bias is not None
                nn.init.constant_(layer.bias, float(name in ones))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N,3,crop,crop] to logits [N,classes]."""
        return self.fc8(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Map [N,3,crop,crop] to the input of fc8 [N,4096]. Shapes below are those of a 224-px crop."""
        fused = fuses_bias(x, self.lrn_alpha, self.activation, self.window)
        split = self.form.groups == "towers" and not self.normalises_across
        maps = convolve_pixels(self.conv1, x, self.conv1_pad, self.form, split, not fused)  # [N,96,55,55]
        bias = self.conv1.bias if fused else None
        maps = self._normalise_and_pool(maps, bias, not self.preset.lrn1_before_relu)  # [N,96,27,27]
        if self.variant.without == "conv2":
            maps = [self.pool(x) for x in maps]
        else:
            maps = convolve(self.conv2, maps, self.form, not fused)  # [N,256,27,27]
            bias = self.conv2.bias if fused else None
            maps = self._normalise_and_pool(maps, bias, True, self.preset.spatial_norm)  # [N,256,13,13]
        maps = self._convolve("conv3", maps)  # [N,384,13,13]
        maps = self._convolve("conv4", maps)  # [N,384,13,13]
        maps = self._convolve("conv5", maps)  # [N,256,13,13]
        x = joined([self.pool(x) for x in maps])  # [N,256,6,6]
        if self.variant.conv6:
            x = self.activation(self.conv6(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # [N,9216]
        x = self.drop6(self.activation(self.fc6(x)))
        return self.drop7(self.activation(self.fc7(x)))

    def _convolve(self, name: str, maps: Maps) -> Maps:
        """Apply a convolution and its activation, unless the variant leaves them out."""
        if name == self.variant.without:
            return maps
        layer: nn.Conv2d = getattr(self, name)
        return [self.activation(x) for x in convolve(layer, maps, self.form)]

    def _normalise_and_pool(
        self, maps: Maps, bias: Tensor | None, relu_first: bool, spatial_norm: bool = False
    ) -> Maps:
        """Apply the activation, the normalisation and the pooling that follow a convolution.

        bias: the bias of the convolution, if the convolution did not add it.
        """
        if self.normalises_across:
            maps = [joined(maps)]
        biases = [None] * len(maps) if bias is None else bias.chunk(len(maps))
        return [
            normalise_and_pool(
                x,
                self.lrn_alpha,
                min(self.preset.lrn_towers, self.variant.towers) if len(maps) == 1 else 1,
                relu_first,
                spatial_norm and self.variant.lrn,
                activation=self.activation,
                window=self.window,
                bias=bias,
                round_up=self.round_up,
            )
            for x, bias in zip(maps, biases, strict=True)
        ]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, crop: int = 224) -> int:
    """Return the number of multiply-accumulates in the forward pass of one image.

    Only convolutions and linear layers count. The pass runs on the meta device, so nothing is computed, and
    the model is unchanged.
    """
    total = 0

    def add(layer: nn.Conv2d | nn.Linear, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        meta = {name: value.to("meta") for name, value in model.state_dict().items()}
        torch.func.functional_call(model, meta, torch.empty(1, 3, crop, crop, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return total
