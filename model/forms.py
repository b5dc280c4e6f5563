"""Forms of the net's convolutions, which compute the same function up to rounding, at different speeds.

grouped         as the layers are written: conv2, conv4 and conv5 in two groups
towers          each group separately; the maps of the two towers are joined where a layer sees both
block-diagonal  one convolution over both groups, half of whose weights are 0: twice the arithmetic

With -s2d ("space to depth"), conv1 sees each block of 4×4 pixels as one pixel with 48 channels. It is then
3×3 with stride 1 instead of 11×11 with stride 4, after a row and a column of zeros are added to its kernels.

Which form is fastest depends on the device and its library.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 4  # pixels: conv1's stride

Maps = list[Tensor]  # one [N,C,H,W] for all kernels, or one for each tower


class Form(NamedTuple):
    """How to compute groups and conv1."""

    groups: str = "grouped"
    space_to_depth: bool = False


GROUPS = ("grouped", "towers", "block-diagonal")
FORMS = {
    groups + "-s2d" * space_to_depth: Form(groups, space_to_depth)
    for groups in GROUPS
    for space_to_depth in (False, True)
}


def convolve_pixels(
    layer: nn.Conv2d, x: Tensor, padding: int, form: Form, apart: bool, biased: bool = True
) -> Maps:
    """Apply conv1 to x: [N,3,crop,crop].

    padding: number of zeros on the right and bottom that the last window needs. apart: whether to return
    each tower's maps separately. biased: whether to add the bias.
    """
    bias = layer.bias if biased else None
    if form.space_to_depth:
        x = _blocks(F.pad(x, (0, padding + 1, 0, padding + 1)))
        weight = _blocks(F.pad(layer.weight, (0, 1, 0, 1)))
        return _halves([x, x], weight, bias) if apart else [F.conv2d(x, weight, bias)]
    x = F.pad(x, (0, padding, 0, padding))
    return _halves([x, x], layer.weight, bias, BLOCK) if apart else [_as_written(layer, x, biased)]


def convolve(layer: nn.Conv2d, maps: Maps, form: Form, biased: bool = True) -> Maps:
    """Apply a layer after conv1. biased: whether to add its bias."""
    bias = layer.bias if biased else None
    if form.groups == "towers":
        if layer.groups == 1:
            maps = 2 * [joined(maps)]
        elif len(maps) == 1:
            maps = list(maps[0].chunk(2, 1))
        return _halves(maps, layer.weight, bias, padding=layer.padding)
    (x,) = maps
    if form.groups == "block-diagonal" and layer.groups == 2:
        first, second = layer.weight.chunk(2)
        zeros = torch.zeros_like(first)
        weight = torch.cat([torch.cat([first, zeros], 1), torch.cat([zeros, second], 1)])
        return [F.conv2d(x, weight, bias, padding=layer.padding)]
    return [_as_written(layer, x, biased)]


def joined(maps: Maps) -> Tensor:
    """Join the maps of all kernels: [N,C,H,W]."""
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def _as_written(layer: nn.Conv2d, x: Tensor, biased: bool) -> Tensor:
    if biased:
        return layer(x)
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, groups=layer.groups)


def _halves(
    maps: Maps, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: str | tuple[int, ...] = (0, 0)
) -> Maps:
    """Apply each tower's half of the kernels to the maps that it sees."""
    biases = (None, None) if bias is None else bias.chunk(2)
    halves = zip(maps, weight.chunk(2), biases, strict=True)
    return [F.conv2d(*half, stride, padding) for half in halves]


def _blocks(x: Tensor) -> Tensor:
    """Map [N,C,H,W] to [N,16·C,H/4,W/4], channels_last.

    Neighbours in a row stay neighbours, so this is one copy of long runs, and a compiler can fuse it with
    the padding before it.
    """
    n, c, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK * c)
    return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)
