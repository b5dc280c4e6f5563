"""Compute ReLU, local response normalisation and 3×3 max-pooling with stride 2 in one pass on a GPU.

Inputs are fp16, bf16 or fp32 in NHWC order. The bias of the preceding convolution is added first. Arithmetic
is in fp32. Only the input and one byte per output are saved for the backward pass: the index of the maximum
in its window. `reference_normalise_and_pool` in fused.py defines the result. As in the reference, normalised
values are rounded to the input's type before they are compared, so both choose the same maximum.
"""
# mypy: disable-error-code="assignment, has-type, misc"
# (The kernels extend tuples, but mypy expects a fixed length.)

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from model.pooled import empty_pooled
from model.triton_lrn import (
    equal_blocks,
    grid,
    layout,
    load_activation,
    local_gradient,
    normalised,
    position,
    strips,
)

NO_MAXIMUM = tl.constexpr(15)  # the index in a window that has no positive value


@triton.jit
def ordering_keys(b, dtype: tl.constexpr, y: tl.constexpr):
    """Return integer keys that order pixels by b, rounded to `dtype`; the first of equal values is greatest.

    The upper bits of a key are those of the value. The lower bits are the index of the pixel in its window,
    from 8 for the first pixel to 0 for the last, so one comparison finds both the value and the index. This
    function sets the index of the first pixel in row y. Negative values are in the wrong order only among
    themselves, and the ReLU makes all of them 0. NaN, whose sign bit arithmetic clears, is the greatest.
    """
    bits: tl.constexpr = dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    wide: tl.constexpr = tl.int32 if bits == 16 else tl.int64
    return (b.to(dtype).to(integer, bitcast=True).to(wide) << bits) | (8 - 3 * y)


@triton.jit
def maxima_of_three(keys, windows: tl.constexpr):
    """Return the greatest key of a row in each of several neighbouring windows; they share every other pixel.

    keys: a key for each pixel, with the index of a window's first pixel. The indices of the second and the
    third pixel of a window are smaller by 1 and 2.
    """
    maxima = ()
    for window in tl.static_range(windows):
        first, second, third = keys[2 * window], keys[2 * window + 1] - 1, keys[2 * window + 2] - 2
        maxima += (tl.maximum(tl.maximum(first, second), third),)
    return maxima


@triton.jit
def store_maxima(y, argmax, above, middle, below, mask, stride: tl.constexpr, windows: tl.constexpr):
    """Store the maxima of neighbouring windows and their indices, or 0 and NO_MAXIMUM if none is positive.

    above, middle, below: the greatest keys in the three rows of each window. The last row is also the first
    row of the windows below; its keys for these windows, with an index greater by 6, are returned.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    bits: tl.constexpr = dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    following = ()
    for step in tl.static_range(windows):
        key = tl.maximum(tl.maximum(above[step], middle[step]), tl.maximum(below[step], NO_MAXIMUM))
        tl.store(y + step * stride, (key >> bits).to(integer).to(dtype, bitcast=True), mask)
        tl.store(argmax + step * stride, key.to(tl.uint8), mask)
        following += (below[step] + 6,)
    return following


@triton.jit
def _row_maxima(
    x, bias, mask, alpha, first, last, stride: tl.constexpr, relu_first: tl.constexpr,
    y: tl.constexpr, windows: tl.constexpr,
):  # fmt: skip
    """Return the greatest keys in a row of pixels, which is row y of its windows, for each window."""
    keys = ()
    for step in tl.static_range(2 * windows + 1):
        b = normalised(load_activation(x + step * stride, bias, mask, relu_first), alpha, first, last)
        keys += (ordering_keys(b, x.dtype.element_ty, y),)
    return maxima_of_three(keys, windows)


@triton.jit
def _pool(
    x, bias, y, argmax, alpha: tl.constexpr, relu_first: tl.constexpr, count, row_blocks, column_blocks,
    height, width, rows, columns, tower_channels: tl.constexpr, towers: tl.constexpr, lanes: tl.constexpr,
    block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    strip, channel, exists, first, last = strips(count, tower_channels, lanes)
    stride: tl.constexpr = tower_channels * towers
    channel += strip % towers * tower_channels
    image, row, column = position(strip // towers, row_blocks, column_blocks)
    # The last blocks overlap the previous ones, and store the same values again.
    row = tl.minimum(row * block_rows, rows - block_rows)
    column = tl.minimum(column * block_columns, columns - block_columns)
    x += ((image * height + 2 * row) * width + 2 * column) * stride + channel
    offset = ((image * rows + row) * columns + column) * stride + channel
    y, argmax = y + offset, argmax + offset
    bias_values = tl.load(bias + channel, exists, other=0.0)
    above = _row_maxima(x, bias_values, exists, alpha, first, last, stride, relu_first, 0, block_columns)
    for _ in range(block_rows):
        x += width * stride
        middle = _row_maxima(x, bias_values, exists, alpha, first, last, stride, relu_first, 1, block_columns)
        x += width * stride
        below = _row_maxima(x, bias_values, exists, alpha, first, last, stride, relu_first, 2, block_columns)
        above = store_maxima(y, argmax, above, middle, below, exists, stride, block_columns)
        y, argmax = y + columns * stride, argmax + columns * stride


@triton.jit
def _gradient_at(window, y: tl.constexpr, z: tl.constexpr):
    """Return the gradient of a window if its maximum was in its row y and column z, and otherwise 0."""
    index, grad = window
    return tl.where(index == 8 - 3 * y - z, grad, 0.0)


@triton.jit
def _load_window(grad, argmax, mask):
    """Load the indices and the gradients of windows."""
    return tl.load(argmax, mask, other=NO_MAXIMUM), tl.load(grad, mask, other=0.0).to(tl.float32)


@triton.jit
def pooled_gradients(grad, argmax, left, right, stride: tl.constexpr):
    """Return the gradients from a row of windows for its three rows of pixels, in two columns each.

    grad, argmax: pointers to the window whose first column is the first of the two. right: whether it exists.
    left: whether the window before it exists, whose last column is the first of the two.
    """
    own, previous = _load_window(grad, argmax, right), _load_window(grad - stride, argmax - stride, left)
    gradients = ()
    for y in tl.static_range(3):
        gradients += ((_gradient_at(own, y, 0) + _gradient_at(previous, y, 2), _gradient_at(own, y, 1)),)
    return gradients


@triton.jit
def _backward(
    grad, argmax, x, bias, result, bias_parts, alpha: tl.constexpr, relu_first: tl.constexpr, count,
    row_blocks, column_blocks, height, width, rows, columns, tower_channels: tl.constexpr,
    towers: tl.constexpr, lanes: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """Process blocks of 2×2 pixels from top to bottom. A block lies in four windows, two of which the block
    above has read."""
    strip, channel, exists, first, last = strips(count, tower_channels, lanes)
    stride: tl.constexpr = tower_channels * towers
    bias_parts += strip * tower_channels + channel
    channel += strip % towers * tower_channels
    image, row, column = position(strip // towers, row_blocks, column_blocks)
    row *= block_rows
    window_offset = ((image * rows + row) * columns + column) * stride + channel
    grad, argmax = grad + window_offset, argmax + window_offset
    offset = ((image * height + 2 * row) * width + 2 * column) * stride + channel
    x, result = x + offset, result + offset
    bias_values = tl.load(bias + channel, exists, other=0.0)
    left, right = exists & (column > 0) & (column <= columns), exists & (column < columns)
    above = (row > 0) & (row <= rows)
    window_row = columns * stride
    _, _, carried = pooled_gradients(
        grad - window_row, argmax - window_row, left & above, right & above, stride
    )
    total = tl.full(channel.shape, 0.0, tl.float32)
    for _ in range(block_rows):
        inside = row < rows
        top, bottom, following = pooled_gradients(grad, argmax, left & inside, right & inside, stride)
        for y in tl.static_range(2):
            for z in tl.static_range(2):
                mask = exists & (2 * row + y < height) & (2 * column + z < width)
                a = load_activation(x + z * stride, bias_values, mask, relu_first)
                g = carried[z] + top[z] if y == 0 else bottom[z]
                g = local_gradient(g, a, alpha, first, last, relu_first)
                tl.store(result + z * stride, g.to(result.dtype.element_ty), mask)
                total += g
            x, result = x + width * stride, result + width * stride
        carried = following
        row += 1
        grad, argmax = grad + columns * stride, argmax + columns * stride
    tl.store(bias_parts, total, exists)


@triton_op("alexnet::normalise_and_pool", mutates_args={})
def normalise_and_pool(
    x: Tensor, bias: Tensor, alpha: float, towers: int, relu_first: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward pass on x: [N,C,H,W] and bias: [C]; other arguments are as in fused.py.

    Returns the pooled maps and the indices of the maxima, both [N,C,(H-1)//2,(W-1)//2], channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    y, argmax = empty_pooled(x, x.dtype), empty_pooled(x, torch.uint8)
    rows, columns = y.shape[2:]
    sizes = layout(channels, towers)
    row_blocks, block_rows = equal_blocks(rows, 13)
    column_blocks, block_columns = equal_blocks(columns, 3)
    strips = n * row_blocks * column_blocks * towers
    wrap_triton(_pool)[grid(strips, sizes)](
        x, bias, y, argmax, alpha, relu_first, strips, row_blocks, column_blocks, height, width, rows,
        columns, block_rows=block_rows, block_columns=block_columns, **sizes,
    )  # fmt: skip
    return y, argmax


@triton_op("alexnet::normalise_and_pool_backward", mutates_args={})
def _gradient(
    grad: Tensor, x: Tensor, bias: Tensor, argmax: Tensor, alpha: float, towers: int, relu_first: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    result = torch.empty_like(x)
    sizes = layout(channels, towers)
    row_blocks, block_rows = equal_blocks(triton.cdiv(height, 2), 14)
    column_blocks = triton.cdiv(width, 2)
    strips = n * row_blocks * column_blocks * towers
    bias_parts = torch.empty((strips // towers, channels), device=x.device)
    wrap_triton(_backward)[grid(strips, sizes)](
        grad, argmax, x, bias, result, bias_parts, alpha, relu_first, strips, row_blocks, column_blocks,
        height, width, *argmax.shape[2:], block_rows=block_rows, **sizes,
    )  # fmt: skip
    return result, bias_parts.sum(0)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias, output[1])


def _autograd(ctx, grad: Tensor, _argmax: None) -> tuple[Tensor, Tensor, None, None, None]:
    return *_gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
