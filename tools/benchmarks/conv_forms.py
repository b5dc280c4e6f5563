"""Other ways to compute the same convolutions, for `tools/bench.py conv1`, `conv2`, … to compare.

Each form takes pixels or activations [N,C,H,W], the weight and the bias of the net's own layer, and
returns what that layer would, to rounding. Which is fastest depends on the device and its library.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.precision import autocast

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """Of AlexNet at 224 px: what comes in, its weight [out,in,k,k], and its forms, the net's first."""

    input: tuple[int, int]  # channels, side in pixels
    weight: tuple[int, int, int, int]
    forms: dict[str, Form]


def strided(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv1: 11×11 with stride 4."""
    return F.conv2d(x, weight, bias, stride=4)


def space_to_depth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv1 as 3×3 over blocks of 4×4 pixels, in 48 channels: a row and a column of 0 fill 11 up to 12."""
    side = -(-(x.shape[-1] + 1) // 4) * 4
    more = side - x.shape[-1]
    blocks = F.pixel_unshuffle(F.pad(x, (0, more, 0, more)), 4)
    return F.conv2d(blocks, F.pixel_unshuffle(F.pad(weight, (0, 1, 0, 1)), 4), bias)


def _padding(weight: Tensor) -> int:
    return weight.shape[-1] // 2


def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=_padding(weight), groups=2)


def towers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each half by itself, as on the two GPUs of 2012, and joined."""
    halves = zip(x.chunk(2, 1), weight.chunk(2), bias.chunk(2), strict=True)
    return torch.cat([F.conv2d(*half, padding=_padding(weight)) for half in halves], 1)


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One dense convolution, half of whose weights are 0: twice the arithmetic, and no groups."""
    first, second = weight.chunk(2)
    nothing = torch.zeros_like(first)
    dense = torch.cat([torch.cat([first, nothing], 1), torch.cat([nothing, second], 1)])
    return F.conv2d(x, dense, bias, padding=_padding(weight))


GROUPED: dict[str, Form] = {"grouped": grouped, "towers": towers, "block-diagonal": block_diagonal}
LAYERS = {
    "conv1": Layer((3, 227), (96, 3, 11, 11), {"strided": strided, "space to depth": space_to_depth}),
    "conv2": Layer((96, 27), (256, 48, 5, 5), GROUPED),
    "conv4": Layer((384, 13), (384, 192, 3, 3), GROUPED),
    "conv5": Layer((384, 13), (256, 192, 3, 3), GROUPED),
}


def form_work(
    layer: Layer, form: Form, batch: int, precision: str, device: torch.device
) -> Callable[[], int]:
    """A form forward and backward, in channels_last; conv1 has no gradient of its input. Returns `batch`."""
    channels, side = layer.input

    def channels_last(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)

    x = channels_last(batch, channels, side, side).requires_grad_(channels > 3)
    weight = channels_last(*layer.weight).requires_grad_()
    bias = torch.zeros(layer.weight[0], device=device, requires_grad=True)
    with torch.no_grad(), autocast(precision, device):
        grad = torch.randn_like(form(x, weight, bias))

    def work() -> int:
        with autocast(precision, device):
            y = form(x, weight, bias)
        wanted = [x, weight, bias] if x.requires_grad else [weight, bias]
        torch.autograd.grad(y, wanted, grad)
        return batch

    return work
