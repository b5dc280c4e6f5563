"""ReLU, response normalisation and overlapping pooling as one operation that keeps only its input.

Separately, they are a dozen passes over the net's largest activations, bound by memory rather than by
arithmetic. On a CPU, one pass of a C kernel does all of it. On a GPU, there is one Triton kernel forward and
one backward, or two of each with spatial normalisation. Without a kernel, or with options that the kernels do
not support, the operation runs on a few images at a time, which stay in the cache, and is repeated for the
gradient.
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
SLICE_BYTES = 4 << 20  # of input: a few images, whose intermediate results stay in the cache


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
    """Compute the operation as the paper describes it; fast implementations are tested against this one."""
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
    x = F.max_pool2d(x, window, stride=2)  # windows of 3 overlap (section 3.4)
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
    """Apply ReLU, local response normalisation and 3×3 max-pooling with stride 2, in the order of a preset.

    alpha, towers: as in `local_response_norm`; if alpha is None, there is no normalisation. relu_first:
    whether the ReLU comes first or last. spatial_norm: whether `spatial_response_norm` follows the local
    one. activation: function to use instead of ReLU. window: side of the pooling windows in pixels, instead
    of 3. bias: [C], that of the preceding convolution if it did not add its bias (see `adds_bias`).

    x: [N,C,H,W], preferably channels_last. Returns [N,C,(H-window)//2+1,(W-window)//2+1] of the same type
    and layout.
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
    """Return whether `normalise_and_pool` uses GPU kernels for x's type and device with these options.

    They also add the convolution's bias and sum its gradient, which saves two passes.
    """
    published = _published(alpha, activation, window)
    return published and x.is_cuda and x.dtype != torch.float64 and _has_gpu_kernels()


def _published(alpha: float | None, activation: Activation, window: int) -> bool:
    """Return whether this is the paper's operation, the only one that has kernels."""
    return alpha is not None and activation is F.relu and window == 3


@cache  # must be outermost: some versions of Dynamo look beneath a cache, and must find the constant there
@torch.compiler.assume_constant_result
def _has_gpu_kernels() -> bool:
    """Return whether the kernels can be built here, which takes Triton and, at run time, a C compiler."""
    if find_spec("triton") is None:
        return False
    from model import triton_pool

    try:
        x, bias = torch.zeros(1, 16, 3, 3, device="cuda"), torch.zeros(16, device="cuda")
        triton_pool.normalise_and_pool(x, bias, 1e-4, 1, True)
    except Exception as error:  # whatever a compiler and a driver can raise
        warnings.warn(f"no fused GPU kernels, so the net will be slower: {error}", stacklevel=2)
        return False
    return True


def _uses_cpu_kernel(x: Tensor, alpha: float | None, activation: Activation, window: int) -> bool:
    """Return whether to use cpu_pool.c here. An exported net must contain only torch's own operators."""
    computed = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    published = _published(alpha, activation, window)
    return computed and published and not torch.compiler.is_exporting() and _has_cpu_kernel()


@torch.compiler.assume_constant_result
def _has_cpu_kernel() -> bool:
    """Return whether cpu_pool.c was built for this machine. Python shows the warning only once."""
    try:
        from model import cpu_pool  # noqa: F401
    except OSError as error:
        warnings.warn(f"no compiled CPU kernel, so the net will be slower: {error}", stacklevel=2)
        return False
    return True


class _Sliced(torch.autograd.Function):
    """Apply a function that treats each image separately to slices of a few images."""

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
