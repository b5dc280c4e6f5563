"""Functions for the GPU kernels: bias, ReLU and local response normalisation of maps in NHWC order.

Each thread has eight neighbouring channels. The threads that cover the channels of a tower form a strip,
which processes a few columns of the maps row by row. A program is a single warp with as many strips as fit.
The two channels on either side of a thread's own thus come from other threads' registers, and few lanes are
idle.

α is a compile-time constant of the kernels. Otherwise, torch.compile would pass it in fp64, and
arithmetic with it would be in fp64.
"""

import triton
import triton.language as tl

K = tl.constexpr(2.0)
BETA = tl.constexpr(0.75)
GROUP = tl.constexpr(8)  # number of neighbouring channels per thread
WARP = tl.constexpr(32)  # number of lanes


@triton.jit
def strips(count, tower_channels: tl.constexpr, lanes: tl.constexpr):
    """Assign strips and channels to a program's lanes. count: number of all strips.

    Returns the strip of each lane [lanes,1], its channels within the tower [lanes,8], a mask of those that
    exist [lanes,8], and whether the lane has the first and the last channels of the tower, both [lanes].
    """
    groups: tl.constexpr = (tower_channels + GROUP - 1) // GROUP
    strips_per_program: tl.constexpr = lanes // groups
    lane = tl.arange(0, lanes)
    strip = (tl.program_id(0) * strips_per_program + lane // groups)[:, None]
    group = lane % groups
    channel = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    exists = (lane < strips_per_program * groups)[:, None] & (strip < count)
    if groups * GROUP != tower_channels:
        exists = exists & (channel < tower_channels)
    return strip, channel, exists, group == 0, group == groups - 1


@triton.jit
def position(index, row_blocks, column_blocks):
    """Return the image, the block of rows and the block of columns that an index stands for."""
    row_block = index // column_blocks
    return (row_block // row_blocks).to(tl.int64), row_block % row_blocks, index % column_blocks


@triton.jit
def _neighbour(values, shift: tl.constexpr, at_end):
    """Return the values of the next lane (shift 1) or the previous one (-1); 0 beyond the tower."""
    lane = tl.arange(0, values.shape[0]) + shift
    lane = tl.minimum(tl.maximum(lane, 0), values.shape[0] - 1)
    return tl.where(at_end, 0.0, tl.gather(values, lane, 0))


@triton.jit
def window_sum(values, first, last):
    """Sum over windows of five neighbouring channels; channels outside the tower count as 0.

    values: [lanes,8]. first, last: whether a lane has the first or the last channels of the tower [lanes].
    For its eight sums, a thread fetches only four values from other threads.
    """
    even, odd = tl.split(values.reshape(values.shape[0], 2, 2, 2))
    v04, v26 = tl.split(even)
    v15, v37 = tl.split(odd)
    v0, v4 = tl.split(v04)
    v2, v6 = tl.split(v26)
    v1, v5 = tl.split(v15)
    v3, v7 = tl.split(v37)
    v01, v23, v45, v67 = v0 + v1, v2 + v3, v4 + v5, v6 + v7
    start, middle, end = v01 + v23, v23 + v45, v45 + v67
    even = tl.join(
        tl.join(_neighbour(v67, -1, first) + v01 + v2, middle + v6),
        tl.join(start + v4, end + _neighbour(v0, 1, last)),
    )
    odd = tl.join(
        tl.join(_neighbour(v7, -1, first) + start, v3 + end),
        tl.join(v1 + middle, v5 + v67 + _neighbour(v01, 1, last)),
    )
    return tl.join(even, odd).reshape(values.shape)


@triton.jit
def load_activation(x, bias, mask, relu_first: tl.constexpr):
    """Load x, add the bias, and apply the ReLU if it comes first. NaN stays NaN."""
    a = tl.load(x, mask, other=0.0).to(tl.float32) + bias
    return tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL) if relu_first else a


@triton.jit
def _inverse_root(a, alpha, first, last):
    """Return d^-.5 with d = k + α·Σa² over channels; d^-.75 is the product of this and its square root."""
    return tl.rsqrt(alpha * window_sum(a * a, first, last) + K)


@triton.jit
def normalised(a, alpha, first, last):
    """Return b = a·d^-β, the local response normalisation of a."""
    root = _inverse_root(a, alpha, first, last)
    return a * (root * tl.sqrt(root))


@triton.jit
def local_gradient(g, a, alpha, first, last, relu_first: tl.constexpr):
    """Return the gradient of a, given the gradient g of b = a·d^-β: g·d^-β − 2αβ·a·Σ(g·a·d^-(β+1))."""
    root = _inverse_root(a, alpha, first, last)
    direct = g * (root * tl.sqrt(root))
    shared = window_sum(direct * a * (root * root), first, last)
    result = direct - a * shared * (alpha * (2 * BETA))
    return tl.where(a > 0, result, 0.0) if relu_first else result


def layout(channels: int, towers: int) -> dict[str, int]:
    """Return the compile-time options of kernels that process maps in strips.

    A program is one warp, which has at least a lane for each group of eight channels of a tower.
    """
    groups = triton.cdiv(channels // towers, GROUP.value)
    lanes = max(WARP.value, triton.next_power_of_2(groups))
    return {"tower_channels": channels // towers, "towers": towers, "lanes": lanes, "num_warps": 1}


def grid(strips: int, sizes: dict[str, int]) -> tuple[int]:
    """Return the grid of programs that covers all strips. sizes: the result of `layout`."""
    return (triton.cdiv(strips, sizes["lanes"] // triton.cdiv(sizes["tower_channels"], GROUP.value)),)


def equal_blocks(total: int, limit: int) -> tuple[int, int]:
    """Split `total` into blocks of equal size, at most `limit`. Returns their number and their size.

    The last block may be smaller.
    """
    blocks = triton.cdiv(total, limit)
    return blocks, triton.cdiv(total, blocks)
