"""Layer-wise adaptive rate scaling (LARS) for large batches: You, Gitman and Ginsburg, arXiv:1708.03888."""

from collections.abc import Callable
from typing import Any

import torch


class Lars(torch.optim.SGD):
    """SGD that scales the gradient of each tensor before momentum, as in algorithm 1 of the paper.

    The gradient g of a tensor w becomes  λ·(g + β·w)  with  λ = η·‖w‖ / (‖g‖ + β·‖w‖).  η is the group's
    `trust_coefficient` and β its weight decay. If w or g is zero, λ is 1. Groups without a trust coefficient
    are updated as by SGD.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, **options)
        for group in self.param_groups:
            if "trust_coefficient" in group:  # SGD must not apply the decay again
                group["scaled_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step. It changes the gradients, and does not wait for the device."""
        assert closure is None, "a closure would compute the gradients after they are scaled"
        self._unscale()
        for group in self.param_groups:
            if "trust_coefficient" in group:
                _scale_gradients(group)
        return super().step()

    def _unscale(self) -> None:
        """Divide the gradients by the loss scale of fp16, if GradScaler has left that to this optimizer."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, scale)
            self.grad_scale = None


def _scale_gradients(group: dict[str, Any]) -> None:
    weights = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not weights:
        return
    gradients = [parameter.grad for parameter in weights]
    weight_norms = torch.stack(torch._foreach_norm(weights))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    decay = group["scaled_decay"]
    rates = group["trust_coefficient"] * weight_norms / (gradient_norms + decay * weight_norms)
    rates = torch.where((weight_norms > 0) & (gradient_norms > 0), rates, 1.0)
    torch._foreach_add_(gradients, weights, alpha=decay)
    torch._foreach_mul_(gradients, rates.unbind())
