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

BLOCK = 1024  # values that a program holds at a time
K = tl.constexpr(2.0)
BETA = tl.constexpr(0.75)
NOWHERE = tl.constexpr(255)  # the place of a maximum that the ReLU cut off


@triton.jit
def _of_group(values, shift: tl.constexpr):
    """What the next group of channels has (shift 1), or the one before (-1); 0 beyond the ends."""
    near = tl.broadcast_to(tl.arange(0, values.shape[1])[None, :], values.shape) + shift
    inside = (near >= 0) & (near < values.shape[1])
    return tl.where(inside, tl.gather(values, tl.where(inside, near, 0), 1), 0.0)


@triton.jit
def window_sum(values):
    """Sum over five neighbouring channels; those outside of the tower count as 0.

    values: [columns, channels]. A thread loads eight neighbouring channels at once, and for their
    eight sums it needs no more than four values of other threads.
    """
    groups: tl.constexpr = values.shape[1] // 8
    even, odd = tl.split(values.reshape(values.shape[0], groups, 2, 2, 2))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    v01, v23, v45, v67 = v0 + v1, v2 + v3, v4 + v5, v6 + v7
    first, middle, last = v01 + v23, v23 + v45, v45 + v67
    even = tl.join(
        tl.join(_of_group(v67, -1) + v01 + v2, middle + v6),
        tl.join(first + v4, last + _of_group(v0, 1)),
    )
    odd = tl.join(
        tl.join(_of_group(v7, -1) + first, v3 + last),
        tl.join(v1 + middle, v5 + v67 + _of_group(v01, 1)),
    )
    return tl.join(even, odd).reshape(values.shape)


@triton.jit
def inverse_root(a, alpha):
    """d^-.5 with d = k + α·Σa² over channels; d^-.75 is this times its own root."""
    return tl.rsqrt(alpha * window_sum(a * a) + K)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # and NaN stays NaN


@triton.jit
def normalised(x, alpha, relu_first: tl.constexpr):
    a = relu(x) if relu_first else x
    root = inverse_root(a, alpha)
    return a * (root * tl.sqrt(root))


@triton.jit
def _is_higher(a, b):
    """As max-pooling compares: of equal values the first is kept, and NaN is higher than all."""
    return (a > b) | (a != a)  # noqa: PLR0124


@triton.jit
def tile(tower_channels: tl.constexpr, towers: tl.constexpr, block_columns: tl.constexpr,
         block_channels: tl.constexpr):  # fmt: skip
    """Of a program: its columns [columns,1], its channels [columns,channels], and which of them exist."""
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)[:, None]
    channel = tl.broadcast_to(tl.arange(0, block_channels)[None, :], block_columns, block_channels)
    return column, tl.program_id(2) * tower_channels + channel, channel < tower_channels


@triton.jit
def _row_maximum(row, column, channel, mask, alpha, stride,
                 relu_first: tl.constexpr, normalise: tl.constexpr):  # fmt: skip
    """Greatest normalised value of three columns, and its place among them: 0, 1 or 2."""
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    place = tl.full(mask.shape, 0, tl.int32)
    for step in tl.static_range(3):
        loaded = tl.load(row + (2 * column + step) * stride + channel, mask, other=0.0)
        b = loaded.to(tl.float32)
        if normalise:
            b = normalised(b, alpha, relu_first).to(loaded.dtype).to(tl.float32)
        higher = _is_higher(b, best)
        best, place = tl.where(higher, b, best), tl.where(higher, step, place)
    return best, place


@triton.jit
def _pool(
    x, y, places, alpha, height, width, rows, columns, relu_first: tl.constexpr, normalise: tl.constexpr,
    tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    mask = (column < columns) & exists
    stride = tower_channels * towers
    image = tl.program_id(0).to(tl.int64)
    x += image * height * width * stride
    target = image * rows * columns * stride + column * stride + channel
    first, first_place = _row_maximum(x, column, channel, mask, alpha, stride, relu_first, normalise)
    for row in range(rows):
        middle = x + (2 * row + 1) * width * stride
        second, second_place = _row_maximum(
            middle, column, channel, mask, alpha, stride, relu_first, normalise
        )
        last = middle + width * stride
        third, third_place = _row_maximum(last, column, channel, mask, alpha, stride, relu_first, normalise)
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
def pooled_gradient(grad, places, row, rows, columns, column, channel, mask, stride):
    """What comes to a row from the up to four windows whose maximum was there. grad, places: an image's."""
    total = tl.full(mask.shape, 0.0, tl.float32)
    for up in tl.static_range(2):
        window_row = row // 2 - up
        y = row - 2 * window_row  # the place in that window, if below 3
        if (y < 3) & (window_row >= 0) & (window_row < rows):
            for left in tl.static_range(2):
                window_column = column // 2 - left
                z = column - 2 * window_column
                there = mask & (z < 3) & (window_column >= 0) & (window_column < columns)
                source = (window_row * columns + window_column) * stride + channel
                place = tl.load(places + source, there, other=NOWHERE).to(tl.int32)
                # All is loaded: a mask that differs from channel to channel makes it one by one.
                value = tl.load(grad + source, there, other=0.0).to(tl.float32)
                total += tl.where(place == y * 3 + z, value, 0.0)
    return total


@triton.jit
def local_gradient(g, x, alpha, relu_first: tl.constexpr):
    """With g the gradient of b = a·d^-β, that of a is g·d^-β − 2αβ·a·Σ(g·a·d^-(β+1))."""
    a = relu(x) if relu_first else x
    root = inverse_root(a, alpha)
    direct = g * (root * tl.sqrt(root))
    shared = window_sum(direct * a * (root * root))
    result = direct - a * shared * (alpha * (2 * BETA))
    return tl.where(x > 0, result, 0.0) if relu_first else result


@triton.jit
def _backward(
    grad, places, x, result, alpha, height, width, rows, columns, relu_first: tl.constexpr,
    tower_channels: tl.constexpr, towers: tl.constexpr,
    block_columns: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    image, row = (tl.program_id(0) // height).to(tl.int64), tl.program_id(0) % height
    column, channel, exists = tile(tower_channels, towers, block_columns, block_channels)
    mask = (column < width) & exists
    stride = tower_channels * towers
    pooled = image * rows * columns * stride
    g = pooled_gradient(grad + pooled, places + pooled, row, rows, columns, column, channel, mask, stride)
    here = (image * height + row) * width * stride + column * stride + channel
    loaded = tl.load(x + here, mask, other=0.0).to(tl.float32)
    tl.store(result + here, local_gradient(g, loaded, alpha, relu_first).to(result.dtype.element_ty), mask)


def blocks(channels: int, towers: int) -> dict[str, int]:
    """How a row is divided among programs."""
    block = max(8, triton.next_power_of_2(channels // towers))
    return {
        "tower_channels": channels // towers,
        "towers": towers,
        "block_columns": max(1, BLOCK // block),
        "block_channels": block,
    }


def pool(x: Tensor, alpha: float, towers: int, relu_first: bool, normalise: bool) -> tuple[Tensor, Tensor]:
    """x: [N,C,H,W], channels_last. Returns the pooled values and their places in their windows."""
    n, c, height, width = x.shape
    rows, columns = (height - 1) // 2, (width - 1) // 2
    y = torch.empty((n, c, rows, columns), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    places = torch.empty_like(y, dtype=torch.uint8)
    sizes = blocks(c, towers)
    grid = (n, triton.cdiv(columns, sizes["block_columns"]), towers)
    wrap_triton(_pool)[grid](
        x, y, places, alpha, height, width, rows, columns, relu_first, normalise, **sizes
    )
    return y, places


@triton_op("alexnet::normalise_and_pool", mutates_args={})
def normalise_and_pool(x: Tensor, alpha: float, towers: int, relu_first: bool) -> tuple[Tensor, Tensor]:
    """x: [N,C,H,W]. Returns the pooled values and their places in their windows, channels_last."""
    return pool(x.contiguous(memory_format=torch.channels_last), alpha, towers, relu_first, normalise=True)


@triton_op("alexnet::normalise_and_pool_backward", mutates_args={})
def _gradient(grad: Tensor, x: Tensor, places: Tensor, alpha: float, towers: int, relu_first: bool) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, height, width = x.shape
    result = torch.empty_like(x)
    sizes = blocks(c, towers)
    grid = (n * height, triton.cdiv(width, sizes["block_columns"]), towers)
    rows, columns = places.shape[2:]
    wrap_triton(_backward)[grid](
        grad, places, x, result, alpha, height, width, rows, columns, relu_first, **sizes
    )
    return result


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])


def _autograd(ctx, grad: Tensor, _places: None) -> tuple[Tensor, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
