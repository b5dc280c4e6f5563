"""ReLU, response normalisation and overlapping pooling as one operation that keeps its input alone.

A dozen passes over the largest activations of the net are bound by memory, not by arithmetic. On a
CPU they are one pass of a kernel in C, and on a GPU one Triton kernel forward and one backward, or with a
spatial norm two and two. What those do not compute, and where there is no kernel, goes a few images at
a time, which stay in the cache, and once more for the gradient.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from model.lrn import local_response_norm, spatial_response_norm

Activation = Callable[[Tensor], Tensor]
SLICE_BYTES = 4 << 20  # of input, a few images: what is computed from them stays in the cache


def plain_normalise_and_pool(
    x: Tensor,
    alpha: float | None,
    towers: int = 1,
    relu_first: bool = True,
    spatial_norm: bool = False,
    activation: Activation = F.relu,
    window: int = 3,
    bias: Tensor | None = None,
) -> Tensor:
    """The operation as one reads it in the paper, and what its fast forms are tested against."""
    dtype = x.dtype
    if bias is not None:
        x = x + bias[:, None, None]  # [N,C,H,W], in fp32 until it is normalised
    if relu_first:
        x = activation(x)
    if alpha is not None:
        x = local_response_norm(x, alpha=alpha, towers=towers)
    x = x.to(dtype)
    if spatial_norm:
        x = spatial_response_norm(x)
    x = F.max_pool2d(x, window, stride=2)  # 3: overlapping (section 3.4)
    return x if relu_first else activation(x)


def normalise_and_pool(
    x: Tensor,
    alpha: float | None,
    towers: int = 1,
    relu_first: bool = True,
    spatial_norm: bool = False,
    activation: Activation = F.relu,
    window: int = 3,
    bias: Tensor | None = None,
) -> Tensor:
    """ReLU, local response normalisation and 3×3 max-pooling with stride 2, in the order of a preset.

    alpha, towers: as in `local_response_norm`; without alpha there is none. relu_first: whether the ReLU
    comes before all else or after it. spatial_norm: whether `spatial_response_norm` follows the local
    one. activation: in the ReLU's place. window: side of pooling's windows in pixels, in that of 3.
    bias: [C], of the convolution before, if it was left out there (see `adds_bias`).

    x: [N,C,H,W], best channels_last. Returns [N,C,(H-window)//2+1,(W-window)//2+1] of the same type and
    layout.
    """
    if adds_bias(x, alpha, activation, window):
        from model import triton_pool, triton_spatial

        kernels = triton_spatial if spatial_norm else triton_pool
        if bias is None:
            bias = x.new_zeros(x.shape[1], dtype=torch.float32)
        return kernels.normalise_and_pool(x, bias, alpha, towers, relu_first)[0]
    if bias is not None:
        x = x + bias[:, None, None].to(x.dtype)
    if _uses_cpu_kernel(x, alpha, activation, window):
        from model import cpu_pool

        return cpu_pool.normalise_and_pool(x, alpha, towers, relu_first, spatial_norm)[0]

    def plain(x: Tensor) -> Tensor:
        return plain_normalise_and_pool(x, alpha, towers, relu_first, spatial_norm, activation, window)

    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Sliced.apply(x, plain)
    return plain(x)


def adds_bias(x: Tensor, alpha: float | None, activation: Activation, window: int) -> bool:
    """Whether `normalise_and_pool` of what has x's type and device, with these options, is kernels: they
    add the convolution's bias and sum up its gradient in passing, which are two passes less."""
    published = _published(alpha, activation, window)
    return published and x.is_cuda and x.dtype != torch.float64 and _has_gpu_kernels()


def _published(alpha: float | None, activation: Activation, window: int) -> bool:
    """Whether it is the paper's operation, which alone has kernels."""
    return alpha is not None and activation is F.relu and window == 3


@cache  # outermost: some versions of Dynamo look beneath a cache, and the constant must be what they find
@torch.compiler.assume_constant_result
def _has_gpu_kernels() -> bool:
    """Whether the kernels can be built here: that takes Triton and, at run time, a C compiler."""
    if find_spec("triton") is None:
        return False
    from model import triton_pool

    try:
        x, bias = torch.zeros(1, 16, 3, 3, device="cuda"), torch.zeros(16, device="cuda")
        triton_pool.normalise_and_pool(x, bias, 1e-4, 1, True)
    except Exception as error:  # whatever a compiler and a driver can raise
        warnings.warn(f"slower, without the fused kernels, which cannot be built: {error}", stacklevel=2)
        return False
    return True


def _uses_cpu_kernel(x: Tensor, alpha: float | None, activation: Activation, window: int) -> bool:
    """Whether cpu_pool.c computes it here. A net that is exported is to have torch's own operators."""
    computed = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    published = _published(alpha, activation, window)
    return computed and published and not torch.compiler.is_exporting() and _has_cpu_kernel()


@torch.compiler.assume_constant_result
def _has_cpu_kernel() -> bool:
    """Whether cpu_pool.c was built, for this machine. The warning is shown once, as Python does of itself."""
    try:
        from model import cpu_pool  # noqa: F401
    except OSError as error:
        warnings.warn(f"slower, without the compiled kernel for CPUs: {error}", stacklevel=2)
        return False
    return True


class _Sliced(torch.autograd.Function):
    """`function(x)` of a function that treats each image by itself."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return torch.cat([function(part) for part in x.split(_images_in_a_slice(x))])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        images = _images_in_a_slice(x)
        for part, part_grad, part_result in zip(
            x.split(images), grad.split(images), result.split(images), strict=True
        ):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.function(leaf)
            part_result.copy_(*torch.autograd.grad(output, leaf, part_grad))
        return result, None


def _images_in_a_slice(x: Tensor) -> int:
    return max(1, SLICE_BYTES // (x[:1].numel() * x.element_size()))


def empty_pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the size that x is pooled to, channels_last.

    Compiled, `torch.empty` with a layout is filled with NaN, and of equal calls of `torch.empty_strided` one
    is left, whose result is copied.
    """
    n, channels, height, width = x.shape
    pooled = torch.empty((n, (height - 1) // 2, (width - 1) // 2, channels), dtype=dtype, device=x.device)
    return pooled.permute(0, 3, 1, 2)
