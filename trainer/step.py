"""One step: forward under autocast, loss, backward, update."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes it: on an Ampere or newer GPU, or a CPU with AVX-512.
    Elsewhere a CPU emulates it, twenty times slower than fp32, and an older GPU has fp16."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a forward pass has its precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def prepare(pixels: Tensor, precision: str) -> Tensor:
    """Pixels as the model takes them: autocast converts what it needs, fp32 has to be asked for."""
    return pixels.float() if precision == "fp32" else pixels


class Step:
    """Trains a model batch by batch, without waiting for the device.

    model: maps pixels [n,3,crop,crop] to logits [n,classes]. precision: `bf16`, `fp16` or `fp32`.
    fp16 has its gradients scaled, and a step whose gradients overflow is skipped (`GradScaler`).
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        precision: str,
        device: torch.device,
    ):
        self.model, self.optimizer = model, optimizer
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update. Returns the mean loss and the number of top-1 errors, on the device."""
        self.optimizer.zero_grad(set_to_none=True)  # before the pass forward, which can use their memory
        with autocast(self.precision, self.device):
            logits = self.model(prepare(pixels, self.precision))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), (logits.argmax(1) != labels).sum()
