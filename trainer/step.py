"""Do one training step: forward pass under autocast, loss, backward pass and update."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trainer.precision import autocast, prepare


class Skips(NamedTuple):
    """Numbers of skipped updates: since the last check, and consecutively up to now."""

    steps: int
    consecutive: int


class Condition(NamedTuple):
    """Whether the weights are finite, the loss scale (1 except in fp16), and the skipped updates."""

    weights_finite: bool
    scale: float
    skips: Skips

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Make a condition from the four values of `Step.take_condition`, the first summed over processes."""
        not_finite, scale, steps, consecutive = values
        return cls(not not_finite, scale, Skips(int(steps), int(consecutive)))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether every element is finite, as a bool [] on the device."""
    tensors = list(tensors)
    if tensors[0].is_cuda:
        return get_total_norm(tensors, math.inf).isfinite()  # launches only a few kernels for all tensors
    # On a CPU, `aminmax` takes one vectorised pass, while a norm is not vectorised. Both propagate NaN.
    return torch.stack([extreme for tensor in tensors for extreme in torch.aminmax(tensor)]).isfinite().all()


def state_of(model: nn.Module) -> list[Tensor]:
    """Return what must stay finite in a new model: weights, and buffers such as the statistics of BatchNorm.

    A buffer that is not finite from the beginning, such as a mask of −∞ for attention, is left out.
    """
    buffers = (buffer for buffer in model.buffers() if buffer.isfinite().all())
    values = chain(model.parameters(), buffers)
    return [value for value in values if value.is_floating_point() and value.numel()]


class Step:
    """Trains a model batch by batch, without waiting for the device.

    model: maps pixels [n,3,crop,crop] to logits [n,classes]. precision: `bf16`, `fp16` or `fp32`.
    In fp16, gradients are scaled, and the update is skipped if they overflow (`GradScaler`).
    skip_not_finite: whether to skip updates whose gradients are not finite in the other precisions, too. This
    includes every step whose loss is not finite. The optimizer must then be a fused one, which decides on the
    device whether to update. state: tensors that must stay finite, by default the weights in the optimizer.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        precision: str,
        device: torch.device,
        skip_not_finite: bool = False,
        state: Sequence[Tensor] = (),
    ):
        torch.backends.cudnn.benchmark = True  # all batches have the same shape
        self.model, self.optimizer = model, optimizer
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skip_not_finite = skip_not_finite and precision != "fp16"
        assert not self.skip_not_finite or optimizer.defaults["fused"], "only a fused optimizer can skip"
        self._skips = torch.zeros(2, device=device)  # the values of Skips
        self._state = list(state) or list(self._parameters())

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step on pixels [n,3,crop,crop] and labels [n].

        Returns the mean cross-entropy [] and the number of top-1 errors [], both on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)  # the forward pass can then reuse the gradients' memory
        with autocast(self.precision, self.device):
            logits = self.model(prepare(pixels, self.precision))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.scaler.scale(loss).backward()
        if self.skip_not_finite:
            self._skip_if_not_finite()
        scale = self._scale() if self.scaler.is_enabled() else None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if scale is not None:
            # The scale falls if and only if the update is skipped.
            self._count_skip((self._scale() < scale).float())
        return loss.detach(), (logits.argmax(1) != labels).sum()

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _skip_if_not_finite(self) -> None:
        """Tell the optimizer whether to skip, as GradScaler does. Gradients are equal in all processes."""
        gradients = (p.grad for p in self._parameters() if p.grad is not None)
        skip = (~all_finite(gradient for gradient in gradients if gradient.numel())).float()
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self._count_skip(skip)

    def _count_skip(self, skip: Tensor) -> None:
        """Count the update as skipped if `skip` is 1, and not if it is 0, without waiting for the device."""
        steps, consecutive = self._skips
        self._skips = torch.stack([steps + skip, (consecutive + 1) * skip])

    def _scale(self) -> Tensor:
        """Return the loss scale as an fp32 [] on the device; it is 1 except in fp16."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def take_condition(self) -> Tensor:
        """Return the values for `Condition.of`, float64 [4] on the device, and reset the count of skips."""
        condition = torch.stack([~all_finite(self._state), self._scale(), *self._skips]).double()
        self._skips[:1].zero_()  # assigning a number instead would wait for a copy to the device
        return condition
