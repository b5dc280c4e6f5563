"""ReLU, local response normalisation and 3×3 max-pooling with stride 2 in one pass over NHWC on a GPU.

Inputs are fp16, bf16 or fp32; the bias of the preceding convolution is added first; arithmetic is in fp32.
Only the input and one byte per output are kept for the gradient: the index of the maximum in its window.
`plain_normalise_and_pool` defines the result. As there, normalised values are rounded to the input's type
before they are compared, so both choose the same maximum.
"""
# mypy: disable-error-code="assignment, has-type, misc"
# (The kernels extend tuples, but mypy expects a fixed length.)

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from model.pooled import empty_pooled
from model.triton_lrn import biased, equal_blocks, grid, layout, local_gradient, normalised, position, strips

NOWHERE = tl.constexpr(15)  # the index of a maximum that the ReLU cut off


@triton.jit
def ranked(b, dtype: tl.constexpr, y: tl.constexpr):
    """Return an integer that orders pixels by b, rounded to `dtype`; of equal ones, the first is highest.

    The upper bits are those of the value. The lower bits are the index of the pixel, from 8 for the window's
    first pixel to 0 for its last; here, it is that of the first pixel in row y. One comparison thus finds the
    value and the index. Negative values are in the wrong order only among themselves, and the ReLU cuts all
    of them off. NaN, which arithmetic makes positive, is the highest.
    """
    bits: tl.constexpr = dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    wide: tl.constexpr = tl.int32 if bits == 16 else tl.int64
    return (b.to(dtype).to(integer, bitcast=True).to(wide) << bits) | (8 - 3 * y)


@triton.jit
def maxima_of_three(keys, windows: tl.constexpr):
    """Return the greatest key of a row in each of several neighbouring windows; they share every other pixel.

    keys: one per pixel, with the index of a window's first pixel; those of the next two are 1 and 2 less.
    """
    maxima = ()
    for window in tl.static_range(windows):
        first, second, third = keys[2 * window], keys[2 * window + 1] - 1, keys[2 * window + 2] - 2
        maxima += (tl.maximum(tl.maximum(first, second), third),)
    return maxima


@triton.jit
def store_maxima(y, argmax, above, middle, below, mask, stride: tl.constexpr, windows: tl.constexpr):
    """Store the maxima of neighbouring windows and their indices; without a value above 0, 0 and NOWHERE.

    above, middle, below: the greatest keys in the windows' rows. Returns the greatest keys in the first row
    of the windows below, which is the last row of these, with an index greater by 6.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    bits: tl.constexpr = dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    following = ()
    for step in tl.static_range(windows):
        key = tl.maximum(tl.maximum(above[step], middle[step]), tl.maximum(below[step], NOWHERE))
        tl.store(y + step * stride, (key >> bits).to(integer).to(dtype, bitcast=True), mask)
        tl.store(argmax + step * stride, key.to(tl.uint8), mask)
        following += (below[step] + 6,)
    return following


@triton.jit
def _row_maxima(
    x, bias, mask, alpha, first, last, stride: tl.constexpr, relu_first: tl.constexpr,
    y: tl.constexpr, windows: tl.constexpr,
):  # fmt: skip
    """Return the greatest keys in a row that is row y of its windows."""
    keys = ()
    for step in tl.static_range(2 * windows + 1):
        b = normalised(biased(x + step * stride, bias, mask, relu_first), alpha, first, last)
        keys += (ranked(b, x.dtype.element_ty, y),)
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
    # The last blocks overlap the previous ones, and store the same values there.
    row = tl.minimum(row * block_rows, rows - block_rows)
    column = tl.minimum(column * block_columns, columns - block_columns)
    x += ((image * height + 2 * row) * width + 2 * column) * stride + channel
    target = ((image * rows + row) * columns + column) * stride + channel
    y, argmax = y + target, argmax + target
    added = tl.load(bias + channel, exists, other=0.0)
    above = _row_maxima(x, added, exists, alpha, first, last, stride, relu_first, 0, block_columns)
    for _ in range(block_rows):
        x += width * stride
        middle = _row_maxima(x, added, exists, alpha, first, last, stride, relu_first, 1, block_columns)
        x += width * stride
        below = _row_maxima(x, added, exists, alpha, first, last, stride, relu_first, 2, block_columns)
        above = store_maxima(y, argmax, above, middle, below, exists, stride, block_columns)
        y, argmax = y + columns * stride, argmax + columns * stride


@triton.jit
def _came(window, y: tl.constexpr, z: tl.constexpr):
    """Return the gradient of a window if its maximum was in its row y and column z, and otherwise 0."""
    index, grad = window
    return tl.where(index == 8 - 3 * y - z, grad, 0.0)


@triton.jit
def _window(grad, argmax, mask):
    return tl.load(argmax, mask, other=NOWHERE), tl.load(grad, mask, other=0.0).to(tl.float32)


@triton.jit
def pooled_gradients(grad, argmax, left, right, stride: tl.constexpr):
    """Return the gradients from a row of windows for its three rows of pixels, at two columns each.

    grad, argmax: those of the window whose first column is the first of the two. right: whether this window
    exists. left: whether the previous window exists, whose last column is the first of the two.
    """
    here, before = _window(grad, argmax, right), _window(grad - stride, argmax - stride, left)
    gradients = ()
    for y in tl.static_range(3):
        gradients += ((_came(here, y, 0) + _came(before, y, 2), _came(here, y, 1)),)
    return gradients


@triton.jit
def _backward(
    grad, argmax, x, bias, result, bias_parts, alpha: tl.constexpr, relu_first: tl.constexpr, count,
    row_blocks, column_blocks, height, width, rows, columns, tower_channels: tl.constexpr,
    towers: tl.constexpr, lanes: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """Process blocks of 2×2 pixels, which lie in four windows; two of these were read for the block above."""
    strip, channel, exists, first, last = strips(count, tower_channels, lanes)
    stride: tl.constexpr = tower_channels * towers
    bias_parts += strip * tower_channels + channel
    channel += strip % towers * tower_channels
    image, row, column = position(strip // towers, row_blocks, column_blocks)
    row *= block_rows
    source = ((image * rows + row) * columns + column) * stride + channel
    grad, argmax = grad + source, argmax + source
    here = ((image * height + 2 * row) * width + 2 * column) * stride + channel
    x, result = x + here, result + here
    added = tl.load(bias + channel, exists, other=0.0)
    left, right = exists & (column > 0) & (column <= columns), exists & (column < columns)
    above = (row > 0) & (row <= rows)
    before = columns * stride
    _, _, carried = pooled_gradients(grad - before, argmax - before, left & above, right & above, stride)
    total = tl.full(channel.shape, 0.0, tl.float32)
    for _ in range(block_rows):
        there = row < rows
        top, bottom, following = pooled_gradients(grad, argmax, left & there, right & there, stride)
        for y in tl.static_range(2):
            for z in tl.static_range(2):
                mask = exists & (2 * row + y < height) & (2 * column + z < width)
                a = biased(x + z * stride, added, mask, relu_first)
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
    """Run on x: [N,C,H,W] and bias: [C]. Returns pooled values and indices of the maxima, channels_last."""
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
