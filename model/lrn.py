"""Normalise responses across channels or within maps, in fp32 even under autocast.

x² overflows fp16 for |x| ≥ 256, and the output would silently become zero. Both functions therefore
compute in fp32 (in fp64 for fp64 input) and return the input's type. They are meant for channels_last
maps, whose channels are contiguous: a window over channels is then a sum of shifted views, without
the NCHW copies that `torch.nn.functional.local_response_norm` makes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _window_sum(x: Tensor, size: int) -> Tensor:
    """Sum over windows of `size` neighbours (odd) along the last axis, clipped at its ends."""
    channels = x.shape[-1]
    padded = F.pad(x, (size // 2, size // 2))
    total = padded[..., :channels].clone()
    for shift in range(1, size):
        total += padded[..., shift : shift + channels]
    return total


def _inverse_power(d: Tensor, beta: float) -> Tensor:
    """Return d^-beta. For the paper's .75, two square roots are several times cheaper than `pow`."""
    if beta == 0.75:
        root = d.rsqrt()
        return root * root.sqrt()
    return d.pow(-beta)


class _ResponseNorm(torch.autograd.Function):
    """b = a·d^-β with d = k + α·W(a²), where W sums or averages over a window around each value.

    The gradient is written out because autograd would save every shifted view. If g is the gradient
    of b, the gradient of a is g·d^-β − 2αβ·a·W(g·a·d^-(β+1)): the window is symmetric, so W is its own
    adjoint.
    """

    @staticmethod
    def forward(ctx, a, window, alpha, beta, k):
        d = window(a * a).mul_(alpha).add_(k)
        scale = _inverse_power(d, beta)
        ctx.save_for_backward(a, d, scale)
        ctx.window, ctx.factor = window, -2.0 * alpha * beta
        return a * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, d, scale = ctx.saved_tensors
        direct = grad * scale
        shared = ctx.window((direct * a).div_(d))
        return direct.addcmul_(a, shared, value=ctx.factor), None, None, None, None


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def local_response_norm(
    x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0, towers: int = 1
) -> Tensor:
    """Normalise across neighbouring channels (paper, section 3.3).

    b = a / (k + α·Σa²)^β, with the sum over `size` channels (odd) around each one, clipped at the ends
    of its tower. α multiplies the *sum*; torch's own layer averages, so its alpha corresponds to size·α.

    x: [N,C,H,W], preferably channels_last; `towers` divides C. Returns the same shape and type.
    """
    n, c, h, w = x.shape
    a = _at_least_fp32(x).permute(0, 2, 3, 1).reshape(n, h, w, towers, c // towers)
    b = _ResponseNorm.apply(a, partial(_window_sum, size=size), alpha, beta, k)
    return b.reshape(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype)


def spatial_response_norm(
    x: Tensor, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Normalise within each map: b = a / (k + α/size²·Σa²)^β over a size×size window.

    Not in the paper: the 2012 code runs it after its second local response normalisation
    (`cnorm2` in layers-145.cfg). x: [N,C,H,W]; returns the same shape and type.
    """
    # The zeros of the padding count, so each mean is over size² values, and the mean is its own adjoint.
    mean = partial(F.avg_pool2d, kernel_size=size, stride=1, padding=size // 2)
    return _ResponseNorm.apply(_at_least_fp32(x), mean, alpha, beta, k).to(x.dtype)
