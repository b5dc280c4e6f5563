"""ReLU, local response normalisation and 3×3 max-pooling with stride 2 in one pass over NHWC on a GPU.

In: fp16, bf16 or fp32; arithmetic: fp32. What is kept for the gradient is the input, and one byte
for each output: where in its window the maximum was. `plain_normalise_and_pool` says what is
computed; normalised values are rounded to the input's type before they are compared, as there, so
that both choose the same maximum.

A program holds one tower's channels at a block of columns, so the windows over channels lie within
it. The forward pass goes down the rows, and each third row of a window is the first of the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 2048  # values that a program holds at a time
K = tl.constexpr(2.0)
BETA = tl.constexpr(0.75)
NOWHERE = tl.constexpr(255)  # the place of a maximum that the ReLU cut off


@triton.jit
def _window_sum(values, channel, block_channels: tl.constexpr):
    """Sum over five neighbouring channels; those outside of the tower count as 0."""
    total = values
    for shift in tl.static_range(-2, 3):
        if shift != 0:
            near = channel + shift
            inside = (near >= 0) & (near < block_channels)
            total += tl.where(inside, tl.gather(values, tl.where(inside, near, 0), 1), 0.0)
    return total


@triton.jit
def _inverse_root(a, alpha, channel, block_channels: tl.constexpr):
    """d^-.5 with d = k + α·Σa²; d^-.75 is this times its own root."""
    return tl.rsqrt(alpha * _window_sum(a * a, channel, block_channels) + K)


@triton.jit
def _is_higher(a, b):
    """As max-pooling compares: of equal values the first is kept, and NaN is higher than all."""
    return (a > b) | (a != a)  # noqa: PLR0124


@triton.jit
def _row_maximum(
    row,
    column,
    channel,
    mask,
    alpha,
    stride,
    block_channels: tl.constexpr,
    relu_first: tl.constexpr,
):
    """Greatest normalised value of three columns, and its place among them: 0, 1 or 2."""
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    place = tl.full(mask.shape, 0, tl.int32)
    for step in tl.static_range(3):
        loaded = tl.load(row + (2 * column + step) * stride + channel, mask, other=0.0)
        a = loaded.to(tl.float32)
        if relu_first:
            a = tl.where(a < 0, 0.0, a)  # and NaN stays NaN
        root = _inverse_root(a, alpha, channel, block_channels)
        b = (a * (root * tl.sqrt(root))).to(loaded.dtype).to(tl.float32)
        higher = _is_higher(b, best)
        best, place = tl.where(higher, b, best), tl.where(higher, step, place)
    return best, place


@triton.jit
def _forward(
    x, y, places, alpha, height, width, rows, columns,
    tower_channels: tl.constexpr, towers: tl.constexpr, relu_first: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    image, tower = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[:, None]
    channel = tl.broadcast_to(tl.arange(0, block_channels)[None, :], block_columns, block_channels)
    mask = (column < columns) & (channel < tower_channels)
    stride = tower_channels * towers
    x += image * height * width * stride + tower * tower_channels
    target = image * rows * columns * stride + tower * tower_channels + column * stride + channel
    first, first_place = _row_maximum(x, column, channel, mask, alpha, stride, block_channels, relu_first)
    for row in range(rows):
        middle = x + (2 * row + 1) * width * stride
        second, second_place = _row_maximum(
            middle, column, channel, mask, alpha, stride, block_channels, relu_first
        )
        last = middle + width * stride
        third, third_place = _row_maximum(
            last, column, channel, mask, alpha, stride, block_channels, relu_first
        )
        higher = _is_higher(second, first)
        best, place = tl.where(higher, second, first), tl.where(higher, second_place + 3, first_place)
        higher = _is_higher(third, best)
        best, place = tl.where(higher, third, best), tl.where(higher, third_place + 6, place)
        if not relu_first:
            place = tl.where(best <= 0, NOWHERE, place)
            best = tl.where(best <= 0, 0.0, best)
        here = target + row * columns * stride
        tl.store(y + here, best.to(y.dtype.element_ty), mask)
        tl.store(places + here, place.to(tl.uint8), mask)
        first, first_place = third, third_place


@triton.jit
def _backward(
    grad, x, places, result, alpha, height, width, rows, columns,
    tower_channels: tl.constexpr, towers: tl.constexpr, relu_first: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    image, row = (tl.program_id(0) // height).to(tl.int64), tl.program_id(0) % height
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[:, None]
    channel = tl.broadcast_to(tl.arange(0, block_channels)[None, :], block_columns, block_channels)
    mask = (column < width) & (channel < tower_channels)
    stride = tower_channels * towers

    # What comes from the up to four windows whose maximum was here.
    pooled = image * rows * columns * stride + tl.program_id(2) * tower_channels + channel
    grad_b = tl.full(mask.shape, 0.0, tl.float32)
    for up in tl.static_range(2):
        window_row = row // 2 - up
        y = row - 2 * window_row  # the place in that window, if below 3
        if (y < 3) & (window_row >= 0) & (window_row < rows):
            for left in tl.static_range(2):
                window_column = column // 2 - left
                z = column - 2 * window_column
                there = mask & (z < 3) & (window_column >= 0) & (window_column < columns)
                source = pooled + (window_row * columns + window_column) * stride
                place = tl.load(places + source, there, other=NOWHERE).to(tl.int32)
                grad_b += tl.load(grad + source, there & (place == y * 3 + z), other=0.0).to(tl.float32)

    # With g the gradient of b = a·d^-β, that of a is g·d^-β − 2αβ·a·Σ(g·a·d^-(β+1)).
    here = (
        (image * height + row) * width * stride
        + tl.program_id(2) * tower_channels
        + column * stride
        + channel
    )
    loaded = tl.load(x + here, mask, other=0.0).to(tl.float32)
    a = tl.where(loaded < 0, 0.0, loaded) if relu_first else loaded
    root = _inverse_root(a, alpha, channel, block_channels)
    direct = grad_b * (root * tl.sqrt(root))
    shared = _window_sum(direct * a * (root * root), channel, block_channels)
    grad_a = direct - a * shared * (alpha * (2 * BETA))
    if relu_first:
        grad_a = tl.where(loaded > 0, grad_a, 0.0)
    tl.store(result + here, grad_a.to(result.dtype.element_ty), mask)


def _blocks(channels: int, towers: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels // towers)
    return {
        "tower_channels": channels // towers,
        "towers": towers,
        "block_columns": max(1, BLOCK // block),
        "block_channels": block,
    }


@triton_op("alexnet::normalise_and_pool", mutates_args={})
def normalise_and_pool(x: Tensor, alpha: float, towers: int, relu_first: bool) -> tuple[Tensor, Tensor]:
    """x: [N,C,H,W]. Returns the pooled values and their places in their windows, channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    rows, columns = (height - 1) // 2, (width - 1) // 2
    y = torch.empty((n, c, rows, columns), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    places = torch.empty_like(y, dtype=torch.uint8)
    blocks = _blocks(c, towers)
    grid = (n, triton.cdiv(columns, blocks["block_columns"]), towers)
    wrap_triton(_forward)[grid](
        x, y, places, alpha, height, width, rows, columns, relu_first=relu_first, **blocks
    )
    return y, places


@triton_op("alexnet::normalise_and_pool_backward", mutates_args={})
def _gradient(grad: Tensor, x: Tensor, places: Tensor, alpha: float, towers: int, relu_first: bool) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    result = torch.empty_like(x)
    blocks = _blocks(c, towers)
    grid = (n * height, triton.cdiv(width, blocks["block_columns"]), towers)
    sizes = height, width, *places.shape[2:]
    wrap_triton(_backward)[grid](grad, x, places, result, alpha, *sizes, relu_first=relu_first, **blocks)
    return result


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])


def _autograd(ctx, grad: Tensor, _places: None) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
