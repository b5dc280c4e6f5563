"""The same operation with a second normalisation, within each map, on a GPU (see `model.triton_pool`).

Forward: ReLU and local normalisation; spatial normalisation; pooling. Backward: through pooling and
spatial normalisation as far as each pixel goes; then the sum over each window, and the rest. A sum
over 5×5 pixels needs other programs' pixels, which is why these are five kernels and not two. Each
goes down the rows and keeps the last rows' sums of five columns, so that a pixel loads five values,
not 25. What is kept for the gradient is the input, the once normalised values, and the places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from model.triton_pool import blocks, local_gradient, normalised, pool, pooled_gradient, tile

ALPHA = tl.constexpr(1e-3 / 25)  # on the sum of squares
# 2αβ of the gradient, its root on either side of the sum: fp16 holds what is in between.
FACTOR = tl.constexpr((2 * 0.75 * 1e-3 / 25) ** 0.5)


@triton.jit
def _local(
    x, c, alpha, width, relu_first: tl.constexpr, tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    mask = (column < width) & exists
    here = (tl.program_id(0).to(tl.int64) * width + column) * (tower_channels * towers) + channel
    loaded = tl.load(x + here, mask, other=0.0).to(tl.float32)
    tl.store(c + here, normalised(loaded, alpha, relu_first).to(c.dtype.element_ty), mask)


@triton.jit
def _five_columns(image, row, height, width, column, channel, exists, stride, square: tl.constexpr):
    """Sum of a row's values, or of their squares, over five columns; 0 beyond the map."""
    total = tl.full(exists.shape, 0.0, tl.float32)
    end = tl.where(row < height, width, 0)
    for shift in tl.static_range(-2, 3):
        near = column + shift
        mask = exists & (near >= 0) & (near < end)
        value = tl.load(image + (row * width + near) * stride + channel, mask, other=0.0).to(tl.float32)
        total += value * value if square else value
    return total


@triton.jit
def _spatial(
    c, b, height, width, tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    stride = tower_channels * towers
    image = tl.program_id(0).to(tl.int64) * height * width * stride
    c, b = c + image, b + image
    s0 = tl.full(exists.shape, 0.0, tl.float32)
    s1 = s0
    s2 = _five_columns(c, 0, height, width, column, channel, exists, stride, True)
    s3 = _five_columns(c, 1, height, width, column, channel, exists, stride, True)
    for row in range(height):
        s4 = _five_columns(c, row + 2, height, width, column, channel, exists, stride, True)
        root = tl.rsqrt((s0 + s1 + s2 + s3 + s4) * ALPHA + 1.0)
        mask = exists & (column < width)
        here = (row * width + column) * stride + channel
        value = tl.load(c + here, mask, other=0.0).to(tl.float32) * (root * tl.sqrt(root))
        tl.store(b + here, value.to(b.dtype.element_ty), mask)
        s0, s1, s2, s3 = s1, s2, s3, s4


@triton.jit
def _spatial_backward(
    grad, places, c, direct, term, height, width, rows, columns,
    tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """With g the gradient of c·d^-β: g·d^-β, and what its windows sum up, g·c·d^-(β+1)."""
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    mask = exists & (column < width)
    stride = tower_channels * towers
    image = tl.program_id(0).to(tl.int64) * stride
    pooled, image = image * rows * columns, image * height * width
    grad, places = grad + pooled, places + pooled
    c, direct, term = c + image, direct + image, term + image
    s0 = tl.full(exists.shape, 0.0, tl.float32)
    s1 = s0
    s2 = _five_columns(c, 0, height, width, column, channel, exists, stride, True)
    s3 = _five_columns(c, 1, height, width, column, channel, exists, stride, True)
    for row in range(height):
        s4 = _five_columns(c, row + 2, height, width, column, channel, exists, stride, True)
        root = tl.rsqrt((s0 + s1 + s2 + s3 + s4) * ALPHA + 1.0)
        here = (row * width + column) * stride + channel
        g = pooled_gradient(grad, places, row, rows, columns, column, channel, mask, stride)
        g *= root * tl.sqrt(root)
        value = g * tl.load(c + here, mask, other=0.0).to(tl.float32) * (root * root) * FACTOR
        tl.store(direct + here, g.to(direct.dtype.element_ty), mask)
        tl.store(term + here, value.to(term.dtype.element_ty), mask)
        s0, s1, s2, s3 = s1, s2, s3, s4


@triton.jit
def _local_backward(
    direct, term, c, x, result, alpha, height, width, relu_first: tl.constexpr,
    tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    mask = exists & (column < width)
    stride = tower_channels * towers
    image = tl.program_id(0).to(tl.int64) * height * width * stride
    direct, term, c, x, result = direct + image, term + image, c + image, x + image, result + image
    s0 = tl.full(exists.shape, 0.0, tl.float32)
    s1 = s0
    s2 = _five_columns(term, 0, height, width, column, channel, exists, stride, False)
    s3 = _five_columns(term, 1, height, width, column, channel, exists, stride, False)
    for row in range(height):
        s4 = _five_columns(term, row + 2, height, width, column, channel, exists, stride, False)
        here = (row * width + column) * stride + channel
        g = tl.load(direct + here, mask, other=0.0).to(tl.float32)
        g -= tl.load(c + here, mask, other=0.0).to(tl.float32) * (s0 + s1 + s2 + s3 + s4) * FACTOR
        loaded = tl.load(x + here, mask, other=0.0).to(tl.float32)
        tl.store(result + here, local_gradient(g, loaded, alpha, relu_first).to(x.dtype.element_ty), mask)
        s0, s1, s2, s3 = s1, s2, s3, s4


@triton_op("alexnet::normalise_twice_and_pool", mutates_args={})
def normalise_and_pool(
    x: Tensor, alpha: float, towers: int, relu_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [N,C,H,W]. Returns the pooled values, their places and the once normalised values, channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    c, b = torch.empty_like(x), torch.empty_like(x)
    sizes = blocks(channels, towers)
    parts = triton.cdiv(width, sizes["block_columns"]), towers
    wrap_triton(_local)[(n * height, *parts)](x, c, alpha, width, relu_first, **sizes)
    wrap_triton(_spatial)[(n, *parts)](c, b, height, width, **sizes)
    return *pool(b, alpha, towers, relu_first, normalise=False), c


@triton_op("alexnet::normalise_twice_and_pool_backward", mutates_args={})
def _gradient(
    grad: Tensor, x: Tensor, places: Tensor, c: Tensor, alpha: float, towers: int, relu_first: bool
) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    direct, term, result = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    sizes = blocks(channels, towers)
    grid = (n, triton.cdiv(width, sizes["block_columns"]), towers)
    wrap_triton(_spatial_backward)[grid](
        grad, places, c, direct, term, height, width, *places.shape[2:], **sizes
    )
    wrap_triton(_local_backward)[grid](direct, term, c, x, result, alpha, height, width, relu_first, **sizes)
    return result


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, *output[1:])


def _autograd(ctx, grad: Tensor, _places: None, _c: None) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
