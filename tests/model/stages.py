"""Inputs for the stages of ReLU, normalisation and pooling, and the results of an implementation."""

import torch
from torch import Tensor

ALPHA = 1e-3  # larger than the paper's, so that the normalisation has an effect


def activations(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return normal values, in channels_last, whose squares contribute as much as k."""
    drawn = torch.promote_types(dtype, torch.float32)
    x = 30 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=drawn)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def result_and_gradient(function, x: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Return function(x), and the gradient of x for random weights of the result."""
    output = function(x, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return output.detach(), *torch.autograd.grad(output, x, weights.to(output))
