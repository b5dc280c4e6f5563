"""Compute the net's convolutions in several forms, which differ only in rounding and in speed.

grouped         torch's grouped convolutions: conv2, conv4 and conv5 have two groups
towers          each group separately; the maps of the two towers are joined where a layer sees both
block-diagonal  both groups as one convolution, half of whose weights are 0, with twice the arithmetic

With -s2d ("space to depth"), conv1 sees each block of 4×4 pixels as one pixel with 48 channels. It is then
3×3 with stride 1 instead of 11×11 with stride 4, after a row and a column of zeros are added to its kernels.

Which form is fastest depends on the device and on its library of convolutions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 4  # pixels: conv1's stride

Maps = list[Tensor]  # a single tensor [N,C,H,W] for all kernels, or one for each tower


class Form(NamedTuple):
    """How to compute the groups, and whether to compute conv1 on blocks of pixels."""

    groups: str = "grouped"
    space_to_depth: bool = False


GROUPS = ("grouped", "towers", "block-diagonal")
FORMS = {
    groups + "-s2d" * space_to_depth: Form(groups, space_to_depth)
    for groups in GROUPS
    for space_to_depth in (False, True)
}


def convolve_pixels(
    layer: nn.Conv2d, x: Tensor, padding: int, form: Form, split: bool, with_bias: bool = True
) -> Maps:
    """Apply conv1 to pixels x: [N,3,crop,crop].

    padding: number of rows and columns of zeros that the last windows need at the bottom and on the right.
    split: whether to return each tower's maps separately. with_bias: whether to add the bias.
    """
    bias = layer.bias if with_bias else None
    if form.space_to_depth:
        x = _space_to_depth(F.pad(x, (0, padding + 1, 0, padding + 1)))
        weight = _space_to_depth(F.pad(layer.weight, (0, 1, 0, 1)))
        return _convolve_towers([x, x], weight, bias) if split else [F.conv2d(x, weight, bias)]
    x = F.pad(x, (0, padding, 0, padding))
    if split:
        return _convolve_towers([x, x], layer.weight, bias, BLOCK)
    return [_convolve_as_layer(layer, x, with_bias)]


def convolve(layer: nn.Conv2d, maps: Maps, form: Form, with_bias: bool = True) -> Maps:
    """Apply a convolution after conv1 to the maps. with_bias: whether to add its bias."""
    bias = layer.bias if with_bias else None
    if form.groups == "towers":
        if layer.groups == 1:
            maps = 2 * [joined(maps)]
        elif len(maps) == 1:
            maps = list(maps[0].chunk(2, 1))
        return _convolve_towers(maps, layer.weight, bias, padding=layer.padding)
    (x,) = maps
    if form.groups == "block-diagonal" and layer.groups == 2:
        first, second = layer.weight.chunk(2)
        zeros = torch.zeros_like(first)
        weight = torch.cat([torch.cat([first, zeros], 1), torch.cat([zeros, second], 1)])
        return [F.conv2d(x, weight, bias, padding=layer.padding)]
    return [_convolve_as_layer(layer, x, with_bias)]


def joined(maps: Maps) -> Tensor:
    """Return the maps of all kernels as one tensor [N,C,H,W]."""
    return maps[0] if len(maps) == 1 else torch.cat(maps, 1)


def _convolve_as_layer(layer: nn.Conv2d, x: Tensor, with_bias: bool) -> Tensor:
    if with_bias:
        return layer(x)
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, groups=layer.groups)


def _convolve_towers(
    maps: Maps, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: str | tuple[int, ...] = (0, 0)
) -> Maps:
    """Apply each tower's half of the kernels to the maps that the tower sees."""
    biases = (None, None) if bias is None else bias.chunk(2)
    halves = zip(maps, weight.chunk(2), biases, strict=True)
    return [F.conv2d(*half, stride, padding) for half in halves]


def _space_to_depth(x: Tensor) -> Tensor:
    """Map [N,C,H,W] to [N,16·C,H/4,W/4] in channels_last format ("space to depth").

    Neighbouring pixels of a row stay neighbours, so this copies long runs of memory, and a compiler can fuse
    it with the padding before it.
    """
    n, c, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, height // BLOCK, BLOCK, width // BLOCK, BLOCK * c)
    return x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)
