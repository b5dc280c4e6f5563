"""Compute the operation of `model.triton_pool` with a second normalisation, within each map, on a GPU.

The forward pass has two kernels: `_local` computes bias, ReLU and local normalisation, and `_spatial`
computes spatial normalisation and pooling. The backward pass has two kernels, too: `_spatial_backward`
computes the pixelwise part of pooling and spatial normalisation, with sums over five rows, and
`_local_backward` sums over five columns and computes the rest. One kernel for each pass is not enough,
because a sum over 5×5 pixels needs the pixels of other programs. The input, the values after the first
normalisation, and the indices of the maxima are saved for the backward pass.

Programs process the rows from top to bottom. They add the sums over five columns of a row to the sums of the
five rows around it, so a pixel is loaded once for several columns and all rows, instead of 25 times.
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
    WARP,
    equal_blocks,
    grid,
    layout,
    load_activation,
    local_gradient,
    normalised,
    position,
    strips,
)
from model.triton_pool import maxima_of_three, ordering_keys, pooled_gradients, store_maxima

ALPHA = tl.constexpr(1e-3 / 25)  # factor on the sum of squares
# The square root of the gradient's factor 2αβ, applied before and after the sum, so that the sum fits fp16.
FACTOR = tl.constexpr((2 * 0.75 * 1e-3 / 25) ** 0.5)
PIXELS = 4  # pixels per thread in a kernel that needs no neighbouring pixels
LANE_CHANNELS = tl.constexpr(4)  # channels per thread in a kernel that needs no neighbouring channels


@triton.jit
def _local(
    x, bias, c, alpha: tl.constexpr, relu_first: tl.constexpr, count, total, pixels: tl.constexpr,
    tower_channels: tl.constexpr, towers: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Normalise across channels; a strip is a few of the `total` pixels, consecutive in memory."""
    strip, channel, exists, first, last = strips(count, tower_channels, lanes)
    stride: tl.constexpr = tower_channels * towers
    channel += strip % towers * tower_channels
    # The last strips overlap the previous ones, and store the same values again.
    pixel = tl.minimum(strip // towers * pixels, total - pixels).to(tl.int64)
    x, c = x + pixel * stride + channel, c + pixel * stride + channel
    bias_values = tl.load(bias + channel, exists, other=0.0)
    for step in tl.static_range(pixels):
        a = load_activation(x + step * stride, bias_values, exists, relu_first)
        value = normalised(a, alpha, first, last)
        tl.store(c + step * stride, value.to(c.dtype.element_ty), exists)


@triton.jit
def _five_columns(
    row, mask, column, width, stride: tl.constexpr, square: tl.constexpr, columns: tl.constexpr
):
    """Return the sums of a row's values, or of their squares, over the five columns around each of `columns`.

    row: pointer to the first of these columns; there are at most five. Values outside the map count as 0.
    """
    values = ()
    for shift in tl.static_range(-2, columns + 2):
        near = mask & (column + shift >= 0) & (column + shift < width)
        value = tl.load(row + shift * stride, near, other=0.0).to(tl.float32)
        values += (value * value if square else value,)
    # Each window is the sum of some values up to the end of the first window, and of some values after it.
    upto = (values[4],)
    for step in tl.static_range(4):
        upto = (values[3 - step] + upto[0],) + upto  # noqa: RUF005
    sums = (upto[0],)
    for step in tl.static_range(1, columns):
        after = values[5] if step == 1 else after + values[step + 4]  # noqa: F821
        sums += (upto[step] + after,)
    return sums


@triton.jit
def _zeros(shape: tl.constexpr, columns: tl.constexpr):
    """Return the partial sums of four rows before any row has been added."""
    zeros = ()
    for _ in tl.static_range(columns):
        zeros += (tl.full(shape, 0.0, tl.float32),)
    return zeros, zeros, zeros, zeros


@triton.jit
def _five_rows(partial, sums, columns: tl.constexpr):
    """Add a row's sums to the sums of the five rows around it, from two rows above to two rows below.

    partial: the sums so far of the first four of these rows. Returns the sums of the first row, which are now
    complete, and the partial sums of the other four.
    """
    complete, above, own, below = (), (), (), ()
    for step in tl.static_range(columns):
        complete += (partial[0][step] + sums[step],)
        above += (partial[1][step] + sums[step],)
        own += (partial[2][step] + sums[step],)
        below += (partial[3][step] + sums[step],)
    return complete, (above, own, below, sums)


@triton.jit
def _lane_channels(count, channels: tl.constexpr):
    """Return each lane's index [lanes,1], its channels [lanes,4], and which of them exist [lanes,4]."""
    groups: tl.constexpr = (channels + LANE_CHANNELS - 1) // LANE_CHANNELS
    lane = (tl.program_id(0) * WARP + tl.arange(0, WARP))[:, None]
    channel = lane % groups * LANE_CHANNELS + tl.arange(0, LANE_CHANNELS)[None, :]
    exists = lane < count
    if groups * LANE_CHANNELS != channels:
        exists = exists & (channel < channels)
    return lane // groups, channel, exists


@triton.jit
def _row_maxima(c, complete, mask, stride: tl.constexpr, y: tl.constexpr, windows: tl.constexpr):
    """Return the greatest keys in a row of pixels, which is row y of its windows, for each window.

    complete: the sums of squares over the 5×5 pixels around each pixel.
    """
    keys = ()
    for step in tl.static_range(2 * windows + 1):
        root = tl.rsqrt(complete[step] * ALPHA + 1.0)
        value = tl.load(c + step * stride, mask, other=0.0).to(tl.float32)
        keys += (ordering_keys(value * (root * tl.sqrt(root)), c.dtype.element_ty, y),)
    return maxima_of_three(keys, windows)


@triton.jit
def _spatial(
    c, y, argmax, count, column_blocks, height, width, rows, columns, channels: tl.constexpr,
    windows: tl.constexpr,
):  # fmt: skip
    index, channel, exists = _lane_channels(count, channels)
    image, _, column = position(index, 1, column_blocks)
    column = tl.minimum(column * windows, columns - windows)
    offset = (image * rows * columns + column) * channels + channel
    y, argmax = y + offset, argmax + offset
    column *= 2
    c += (image * height * width + column) * channels + channel
    pixels: tl.constexpr = 2 * windows + 1
    next_row = width * channels
    end = tl.where(exists, height, 0)
    partial = _zeros(channel.shape, pixels)
    for row in tl.static_range(3):
        sums = _five_columns(c + row * next_row, exists, column, width, channels, True, pixels)
        complete, partial = _five_rows(partial, sums, pixels)
    first = _row_maxima(c, complete, exists, channels, 0, windows)
    for row in range(0, 2 * rows, 2):
        sums = _five_columns(c + 3 * next_row, row + 3 < end, column, width, channels, True, pixels)
        complete, partial = _five_rows(partial, sums, pixels)
        second = _row_maxima(c + next_row, complete, exists, channels, 1, windows)
        sums = _five_columns(c + 4 * next_row, row + 4 < end, column, width, channels, True, pixels)
        complete, partial = _five_rows(partial, sums, pixels)
        c += 2 * next_row
        third = _row_maxima(c, complete, exists, channels, 2, windows)
        first = store_maxima(y, argmax, first, second, third, exists, channels, windows)
        y, argmax = y + columns * channels, argmax + columns * channels


@triton.jit
def _spatial_backward(
    grad, argmax, c, direct, sums, count, column_blocks, height, width, rows, columns, channels: tl.constexpr
):
    """Compute g·d^-β and the sums over five rows of g·c·d^-(β+1), given the gradient g of c·d^-β."""
    index, channel, exists = _lane_channels(count, channels)
    image, _, column = position(index, 1, column_blocks)
    window_offset = (image * rows * columns + column) * channels + channel
    grad, argmax = grad + window_offset, argmax + window_offset
    left, right = exists & (column > 0) & (column <= columns), exists & (column < columns)
    column *= 2
    offset = (image * height * width + column) * channels + channel
    c, direct, sums = c + offset, direct + offset, sums + offset
    next_row = width * channels
    end, last_windows = tl.where(exists, height, 0), tl.where(exists, 2 * rows, 0)
    partial = _zeros(channel.shape, 2)
    partial_terms, carried = partial, partial[0]
    for row in tl.static_range(2):
        squares = _five_columns(c + row * next_row, row < end, column, width, channels, True, 2)
        _, partial = _five_rows(partial, squares, 2)
    for row in range(0, height + 2, 2):  # two rows at a time, and then the last two rows of sums
        inside = row < last_windows
        top, bottom, following = pooled_gradients(grad, argmax, left & inside, right & inside, channels)
        for y in tl.static_range(2):
            squares = _five_columns(c + 2 * next_row, row + y + 2 < end, column, width, channels, True, 2)
            complete, partial = _five_rows(partial, squares, 2)
            terms = ()
            for z in tl.static_range(2):
                mask = (row + y < end) & (column + z < width)
                root = tl.rsqrt(complete[z] * ALPHA + 1.0)
                g = (carried[z] + top[z] if y == 0 else bottom[z]) * (root * tl.sqrt(root))
                tl.store(direct + z * channels, g.to(direct.dtype.element_ty), mask)
                value = tl.load(c + z * channels, mask, other=0.0).to(tl.float32)
                terms += (g * value * (root * root) * FACTOR,)
            five, partial_terms = _five_rows(partial_terms, terms, 2)
            for z in tl.static_range(2):
                mask = (row >= 2) & (row + y - 2 < end) & (column + z < width)
                tl.store(sums + z * channels - 2 * next_row, five[z].to(sums.dtype.element_ty), mask)
            c, direct, sums = c + next_row, direct + next_row, sums + next_row
        carried = following
        grad, argmax = grad + columns * channels, argmax + columns * channels


@triton.jit
def _local_backward(
    direct, sums, x, bias, result, bias_parts, alpha: tl.constexpr, relu_first: tl.constexpr, count,
    row_blocks, column_blocks, height, width, tower_channels: tl.constexpr, towers: tl.constexpr,
    lanes: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    strip, channel, exists, first, last = strips(count, tower_channels, lanes)
    stride: tl.constexpr = tower_channels * towers
    bias_parts += strip * tower_channels + channel
    channel += strip % towers * tower_channels
    image, row, column = position(strip // towers, row_blocks, column_blocks)
    row, column = row * block_rows, column * block_columns
    offset = ((image * height + row) * width + column) * stride + channel
    direct, sums, x, result = direct + offset, sums + offset, x + offset, result + offset
    bias_values = tl.load(bias + channel, exists, other=0.0)
    total = tl.full(channel.shape, 0.0, tl.float32)
    for _ in range(block_rows):
        inside = exists & (row < height)
        windows = _five_columns(sums, inside, column, width, stride, False, block_columns)
        for step in tl.static_range(block_columns):
            mask = inside & (column + step < width)
            a = load_activation(x + step * stride, bias_values, mask, relu_first)
            g = tl.load(direct + step * stride, mask, other=0.0).to(tl.float32)
            g -= normalised(a, alpha, first, last) * windows[step] * FACTOR
            g = local_gradient(g, a, alpha, first, last, relu_first)
            tl.store(result + step * stride, g.to(result.dtype.element_ty), mask)
            total += tl.where(mask, g, 0.0)
        row += 1
        direct, sums = direct + width * stride, sums + width * stride
        x, result = x + width * stride, result + width * stride
    tl.store(bias_parts, total, exists)


def _warps(indices: int, channels: int) -> tuple[int, tuple[int]]:
    """Return the number of lanes that `_lane_channels` needs for this many indices, and the grid."""
    lanes = indices * triton.cdiv(channels, LANE_CHANNELS.value)
    return lanes, (triton.cdiv(lanes, WARP.value),)


@triton_op("alexnet::normalise_twice_and_pool", mutates_args={})
def normalise_and_pool(
    x: Tensor, bias: Tensor, alpha: float, towers: int, relu_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass on x: [N,C,H,W] and bias: [C]; other arguments are as in fused.py.

    Returns the pooled maps and the indices of the maxima, both [N,C,(H-1)//2,(W-1)//2], and the values after
    the first normalisation [N,C,H,W], all channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    c, y, argmax = torch.empty_like(x), empty_pooled(x, x.dtype), empty_pooled(x, torch.uint8)
    rows, columns = y.shape[2:]
    sizes = layout(channels, towers)
    count = triton.cdiv(n * height * width, PIXELS) * towers
    wrap_triton(_local)[grid(count, sizes)](
        x, bias, c, alpha, relu_first, count, n * height * width, PIXELS, **sizes
    )
    column_blocks, windows = equal_blocks(columns, 2)
    lanes, programs = _warps(n * column_blocks, channels)
    wrap_triton(_spatial)[programs](
        c, y, argmax, lanes, column_blocks, height, width, rows, columns, channels, windows, num_warps=1
    )
    return y, argmax, c


@triton_op("alexnet::normalise_twice_and_pool_backward", mutates_args={})
def _gradient(
    grad: Tensor, x: Tensor, bias: Tensor, argmax: Tensor, c: Tensor, alpha: float, towers: int,
    relu_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    direct, sums, result = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    column_blocks = triton.cdiv(width, 2)
    lanes, programs = _warps(n * column_blocks, channels)
    wrap_triton(_spatial_backward)[programs](
        grad, argmax, c, direct, sums, lanes, column_blocks, height, width, *argmax.shape[2:], channels,
        num_warps=1,
    )  # fmt: skip
    sizes = layout(channels, towers)
    row_blocks, block_rows = equal_blocks(height, 9)
    column_blocks, block_columns = equal_blocks(width, 3)
    count = n * row_blocks * column_blocks * towers
    bias_parts = torch.empty((count // towers, channels), device=x.device)
    wrap_triton(_local_backward)[grid(count, sizes)](
        direct, sums, x, bias, result, bias_parts, alpha, relu_first, count, row_blocks, column_blocks,
        height, width, block_rows=block_rows, block_columns=block_columns, **sizes,
    )  # fmt: skip
    return result, bias_parts.sum(0)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias, *output[1:])


def _autograd(ctx, grad: Tensor, _argmax: None, _c: None) -> tuple[Tensor, Tensor, None, None, None]:
    return *_gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
