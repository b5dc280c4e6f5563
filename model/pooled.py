"""Allocate the memory that the kernels write pooled maps to."""

import torch
from torch import Tensor


def empty_pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate the maps of 3×3 pooling with stride 2 over x: [N,C,H,W], in channels_last format.

    This is `torch.empty` with a permutation because torch.compile fills the result of `torch.empty` with a
    memory format with NaN, and merges equal calls of `torch.empty_strided` into one, whose result it copies.
    """
    n, channels, height, width = x.shape
    pooled = torch.empty((n, (height - 1) // 2, (width - 1) // 2, channels), dtype=dtype, device=x.device)
    return pooled.permute(0, 3, 1, 2)
