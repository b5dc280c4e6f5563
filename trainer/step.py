"""One step: forward under autocast, loss, backward, update."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm

from trainer.precision import autocast, prepare


class Skips(NamedTuple):
    """Steps without an update since the last look, and how many there are at the end, one after the other."""

    steps: int
    in_a_row: int


class Condition(NamedTuple):
    """Whether the weights are finite; the factor on fp16's loss, else 1; and skips since the last look."""

    weights_finite: bool
    scale: float
    skips: Skips

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """From the numbers of `Step.take_condition`."""
        weights_finite, scale, steps, in_a_row = values
        return cls(bool(weights_finite), scale, Skips(int(steps), int(in_a_row)))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every element is finite, as a bool [] on the device."""
    tensors = list(tensors)
    if tensors[0].is_cuda:
        return get_total_norm(tensors, math.inf).isfinite()  # a few kernels for all of them
    # On a CPU the extremes take one vectorised pass, and a norm one that is not. Both keep NaN.
    return torch.stack([extreme for tensor in tensors for extreme in torch.aminmax(tensor)]).isfinite().all()


class Step:
    """Trains a model batch by batch, without waiting for the device.

    model: maps pixels [n,3,crop,crop] to logits [n,classes]. precision: `bf16`, `fp16` or `fp32`.
    fp16 has its gradients scaled, and a step whose gradients overflow is skipped (`GradScaler`).
    skip_not_finite: does so in the others too; the optimizer must be a fused one, which looks on the
    device whether to update. Losses that are not finite have such gradients.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        precision: str,
        device: torch.device,
        skip_not_finite: bool = False,
    ):
        torch.backends.cudnn.benchmark = True  # each batch has the shape of the one before
        self.model, self.optimizer = model, optimizer
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skips_itself = skip_not_finite and precision != "fp16"
        assert not self.skips_itself or optimizer.defaults["fused"], "only a fused optimizer can skip"
        self._skips = torch.zeros(2, device=device)  # as in Skips

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update. Returns the mean loss and the number of top-1 errors, on the device."""
        self.optimizer.zero_grad(set_to_none=True)  # before the pass forward, which can use their memory
        with autocast(self.precision, self.device):
            logits = self.model(prepare(pixels, self.precision))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        if self.skips_itself:
            self._skip_if_not_finite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), (logits.argmax(1) != labels).sum()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _skip_if_not_finite(self) -> None:
        """Tell the optimizer, as GradScaler does. The gradients are those of all processes: all skip."""
        skip = (~all_finite(p.grad for p in self._parameters() if p.grad is not None)).float()
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        steps, in_a_row = self._skips
        self._skips = torch.stack([steps + skip, (in_a_row + 1) * skip])

    def take_condition(self) -> Tensor:
        """What `Condition.of` reads, float64 [4] on the device. Updates that fp16 leaves out are not counted:
        they show in its scale."""
        scale = self.scaler.scale(torch.ones((), device=self.device))
        condition = torch.stack([all_finite(self._parameters()), scale, *self._skips]).double()
        self._skips[:1].zero_()  # a number in its place would be sent there, and waited for
        return condition
