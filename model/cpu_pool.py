"""Call cpu_pool.c, which computes ReLU, response normalisation and 3×3 max-pooling in one pass on a CPU.

Inputs are bf16 or fp32, and arithmetic is in fp32. Only the input and one byte per output are saved for the
backward pass. The result is bitwise the same with any number of threads.
"""

import ctypes
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import custom_op

from model.pooled import empty_pooled


def open_library(path: str) -> ctypes.CDLL:
    """Load the shared library that has the kernel. Raises OSError if that fails."""
    library = ctypes.CDLL(path)
    library.normalise_and_pool.argtypes = [*5 * [ctypes.c_void_p], ctypes.c_int, ctypes.c_int]
    return library


_spec = find_spec(f"{__package__}._cpu_pool")
if _spec is None or _spec.origin is None:
    raise OSError("it was not built; install a C compiler and reinstall the package to build it")
_LIBRARY = open_library(_spec.origin)  # after torch is loaded, so that both share OpenMP's threads


class _Options(ctypes.Structure):
    """The struct `Options` of cpu_pool.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("images", "height", "width", "channels", "towers")),
        *((name, ctypes.c_int) for name in ("bf16", "relu_first", "spatial_norm")),
        ("alpha", ctypes.c_float),
    ]


def _run(x: Tensor, y: Tensor, argmax: Tensor, gradient: Tensor | None, *options: float) -> None:
    """Compute y and argmax from x; or, if `gradient` is given, compute the gradient of x from that of y.

    In the second case, the argument y holds the gradient of y. options: alpha, towers, relu_first and
    spatial_norm. Raises MemoryError.
    """
    alpha, towers, relu_first, spatial_norm = options
    n, channels, height, width = x.shape
    bf16 = x.dtype == torch.bfloat16
    c_options = _Options(n, height, width, channels, towers, bf16, relu_first, spatial_norm, alpha)
    arrays = [None if array is None else array.data_ptr() for array in (x, y, argmax, gradient)]
    backward, threads = gradient is not None, torch.get_num_threads()
    if _LIBRARY.normalise_and_pool(ctypes.byref(c_options), *arrays, backward, threads):
        raise MemoryError(f"not enough memory for a few rows of {width}×{channels} values")


@custom_op("alexnet::normalise_and_pool_cpu", mutates_args=(), device_types="cpu")
def normalise_and_pool(
    x: Tensor, alpha: float, towers: int, relu_first: bool, spatial_norm: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward pass on x: [N,C,H,W]. The other arguments are as in `fused.normalise_and_pool`.

    Returns the pooled maps and the index of each maximum in its window, both [N,C,(H-1)//2,(W-1)//2] in
    channels_last format. Raises MemoryError.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y, argmax = empty_pooled(x, x.dtype), empty_pooled(x, torch.uint8)
    _run(x, y, argmax, None, alpha, towers, relu_first, spatial_norm)
    return y, argmax


@normalise_and_pool.register_fake
def _(x: Tensor, *_options) -> tuple[Tensor, Tensor]:
    return empty_pooled(x, x.dtype), empty_pooled(x, torch.uint8)


@custom_op("alexnet::normalise_and_pool_cpu_backward", mutates_args=(), device_types="cpu")
def _gradient(
    grad: Tensor, x: Tensor, argmax: Tensor, alpha: float, towers: int, relu_first: bool, spatial_norm: bool
) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(x)
    _run(x, grad, argmax, result, alpha, towers, relu_first, spatial_norm)
    return result


@_gradient.register_fake
def _(_grad: Tensor, x: Tensor, *_options) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output[1])


def _autograd(ctx, grad: Tensor, _argmax: None) -> tuple[Tensor, None, None, None, None]:
    return _gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


normalise_and_pool.register_autograd(_autograd, setup_context=_setup_context)
