"""Compute ReLU, response normalisation and overlapping pooling as one operation that saves only its input.

As separate operations, they make a dozen passes over the net's largest activations, and memory rather than
arithmetic limits their speed. On a CPU, a C kernel does all of it in one pass. On a GPU, there is one Triton
kernel for the forward pass and one for the backward pass, or two for each with spatial normalisation. Without
a kernel, or with options that the kernels do not support, the operation runs on a few images at a time, which
stay in the cache, and the backward pass repeats it.
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
SLICE_BYTES = 4 << 20  # input per slice: a few images, whose intermediate results stay in the cache


def reference_normalise_and_pool(
    x: Tensor,
    alpha: float | None,
    towers: int = 1,
    relu_first: bool = True,
    spatial_norm: bool = False,
    activation: Activation = F.relu,
    window: int = 3,
    bias: Tensor | None = None,
    round_up: bool = False,
) -> Tensor:
    """Compute `normalise_and_pool` step by step, as a reference for the fast implementations."""
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
    x = F.max_pool2d(x, window, stride=2, ceil_mode=round_up)  # windows of 3 overlap (section 3.4)
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
    round_up: bool = False,
) -> Tensor:
    """Apply ReLU, local response normalisation and 3×3 max-pooling with stride 2, in the order of a preset.

    alpha, towers: as in `local_response_norm`; if alpha is None, there is no normalisation. relu_first:
    whether the ReLU comes first or last. spatial_norm: whether `spatial_response_norm` follows the local
    one. activation: function to use instead of ReLU. window: side of the pooling windows in pixels, instead
    of 3. bias: [C], the bias of the preceding convolution, if that did not add it (see `fuses_bias`).
    round_up: whether the last windows may reach beyond the maps; only for windows other than 3.

    x: [N,C,H,W], preferably channels_last. Returns [N,C,(H-window)//2+1,(W-window)//2+1] of the same type
    and layout, with the quotients rounded up if `round_up` says so.
    """
    if fuses_bias(x, alpha, activation, window):
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

    def compute(x: Tensor) -> Tensor:
        options = (alpha, towers, relu_first, spatial_norm, activation, window, None, round_up)
        return reference_normalise_and_pool(x, *options)

    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Sliced.apply(x, compute)
    return compute(x)


def fuses_bias(x: Tensor, alpha: float | None, activation: Activation, window: int) -> bool:
    """Return whether `normalise_and_pool` uses GPU kernels for the type and device of x with these options.

    These kernels also add the convolution's bias and sum its gradient, which saves two passes, so the
    convolution should not add it.
    """
    supported = _kernels_support(alpha, activation, window)
    return supported and x.is_cuda and x.dtype != torch.float64 and _has_gpu_kernels()


def _kernels_support(alpha: float | None, activation: Activation, window: int) -> bool:
    """Return whether the options are those of the paper's net, for which there are kernels."""
    return alpha is not None and activation is F.relu and window == 3


@torch.compiler.assume_constant_result
def _has_gpu_kernels() -> bool:
    """Return whether there are kernels; the cache is out of sight of Dynamo, which would warn about it."""
    return _build_gpu_kernel()


@cache
def _build_gpu_kernel() -> bool:
    """Build and run a small kernel, which requires Triton and a C compiler; return whether that works.

    Warns if it fails.
    """
    if find_spec("triton") is None:
        return False
    from model import triton_pool

    try:
        x, bias = torch.zeros(1, 16, 3, 3, device="cuda"), torch.zeros(16, device="cuda")
        triton_pool.normalise_and_pool(x, bias, 1e-4, 1, True)
    except Exception as error:  # a compiler or a driver may raise anything
        warnings.warn(f"no fused GPU kernels, so the net will be slower: {error}", stacklevel=2)
        return False
    return True


def _uses_cpu_kernel(x: Tensor, alpha: float | None, activation: Activation, window: int) -> bool:
    """Return whether to use cpu_pool.c. An exported net must contain only torch's own operators."""
    supported = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    supported = supported and _kernels_support(alpha, activation, window)
    return supported and not torch.compiler.is_exporting() and _has_cpu_kernel()


@torch.compiler.assume_constant_result
def _has_cpu_kernel() -> bool:
    """Return whether cpu_pool.c was built for this machine, and warn otherwise."""
    try:
        from model import cpu_pool  # noqa: F401
    except OSError as error:
        warnings.warn(f"no compiled CPU kernel, so the net will be slower: {error}", stacklevel=2)
        return False
    return True


class _Sliced(torch.autograd.Function):
    """Apply a function, which must treat each image separately, to a few images at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return torch.cat([function(part) for part in x.split(_images_per_slice(x))])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        images = _images_per_slice(x)
        for part, part_grad, part_result in zip(
            x.split(images), grad.split(images), result.split(images), strict=True
        ):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.function(leaf)
            part_result.copy_(*torch.autograd.grad(output, leaf, part_grad))
        return result, None


def _images_per_slice(x: Tensor) -> int:
    return max(1, SLICE_BYTES // max(1, x[:1].numel() * x.element_size()))
