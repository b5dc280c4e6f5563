"""The paper's update rule and learning rate schedules, by means of torch's SGD. trainer/lars.py has LARS.

Section 5 of the paper:  v ← .9·v − .0005·ε·w − ε·g,  w ← w + v, with the learning rate ε inside v.
`torch.optim.SGD` keeps u with v = −ε·u. The two are the same while ε is constant. When ε changes, u must be
rescaled by old/new to leave v unchanged, which `set_learning_rate` does.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.lars import Lars
from trainer.settings import Settings

DROP = 0.1  # "divide the learning rate by 10 when the validation error stops improving"
MAX_DROPS = 3  # "reduced three times prior to termination"
Factors = tuple[tuple[float, float], ...]  # epochs and the factors that hold from them on
_MIN_IMPROVEMENT = 0.001  # decrease of the error; less is noise with 50,000 validation images


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Group the parameters for the optimizer by what their update depends on.

    Weights and biases are in separate groups, and so are the first layer and layers with their own learning
    rate. A bias is a parameter whose name ends with `bias` or, for LARS, any parameter of one dimension.
    Parameters that require no gradient are left out.

    The learning rate of a group is multiplied by its `scale` and by the last of its `factors`, pairs of an
    epoch and a factor, whose epoch is done. From its `freeze_epoch` on, if it has one, it is 0. If a group is
    `constant`, neither the schedule nor a factor changes its learning rate, except a factor of 0.
    """
    groups: dict[tuple[bool, bool, Factors], dict] = {}
    is_lars = settings.optimizer == "lars"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bias, first = name.endswith("bias"), name.startswith("conv1.")
        bias |= is_lars and parameter.ndim == 1
        constant = bias and settings.bias_schedule == "constant"
        own = (factors for layer in layers_of(name) if (factors := layer_factors(settings, layer)))
        factors = next(own, ())
        if constant:
            factors = tuple((epoch, float(factor > 0)) for epoch, factor in factors)
        groups.setdefault(
            (bias, first, factors),
            {
                "params": [],
                "scale": settings.bias_learning_rate if bias else 1.0,
                "factors": factors,
                "constant": constant,
                "freeze_epoch": settings.freeze_conv1_epoch if first else None,
                "weight_decay": settings.weight_decay if settings.bias_decay or not bias else 0.0,
                **({"trust_coefficient": settings.trust_coefficient} if is_lars and not bias else {}),
            },
        )["params"].append(parameter)
    return list(groups.values())


def layers_of(parameter: str) -> list[str]:
    """Return the names of the modules that hold a parameter, the innermost first: layer4.1, layer4."""
    parts = parameter.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def layer_factors(settings: Settings, layer: str) -> Factors:
    """Return the epochs from which a layer has a factor on its learning rate, in order, with the factors."""
    parts = [(key.partition("@"), factor) for key, factor in settings.layer_learning_rates.items()]
    return tuple(sorted((float(epoch or 0), factor) for (name, _, epoch), factor in parts if name == layer))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """Make the optimizer, with momentum; its learning rate is 0 until `set_learning_rate` is called."""
    groups = parameter_groups(model, settings)
    rule = Lars if settings.optimizer == "lars" else torch.optim.SGD
    optimizer = rule(groups, lr=0.0, momentum=settings.momentum, fused=True)
    trained = [parameter for group in groups for parameter in group["params"]]
    for parameter in trained if settings.momentum else ():
        # Otherwise, the fused update would allocate u without initialising it. If it then skipped the first
        # step, as it may in fp16, later steps would use uninitialised memory as u.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.SGD, learning_rate: float, epoch: float = 0.0, unscheduled: float | None = None
) -> None:
    """Set ε of every group from the learning rate, and rescale u so that v is unchanged.

    epoch: number of epochs done, a fraction, which decides on a group's factor and whether it is frozen.
    unscheduled: the learning rate of groups that are `constant`, by default that of the others.
    """
    for group in optimizer.param_groups:
        # Checkpoints of earlier versions lack the newer keys.
        frozen = group.get("freeze_epoch") is not None and epoch >= group["freeze_epoch"]
        begun = [factor for start, factor in group.get("factors", ()) if epoch >= start]
        factor = 0.0 if frozen else begun[-1] if begun else 1.0
        constant = group.get("constant", False)
        rate = unscheduled if constant and unscheduled is not None else learning_rate
        old, new = group["lr"], rate * group.get("scale", 1.0) * factor
        if old != new and old and new:
            buffers = _momentum_buffers(optimizer, group["params"])
            if buffers:
                torch._foreach_mul_(buffers, old / new)
        elif new and not old:  # v is 0 after steps with ε = 0
            for buffer in _momentum_buffers(optimizer, group["params"]):
                buffer.zero_()
        group["lr"] = new


def _momentum_buffers(optimizer: torch.optim.SGD, parameters: Iterable[Tensor]) -> list[Tensor]:
    buffers = (optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in parameters)
    return [buffer for buffer in buffers if buffer is not None]


def plateau_drops(errors: Sequence[float], patience: int) -> int:
    """Return how often the learning rate has been divided by ten, given the validation error of each epoch.

    It is divided when the lowest error has not fallen for `patience` epochs, at most MAX_DROPS times.
    """
    best, stale, drops = math.inf, 0, 0
    for error in errors:
        if error < best - _MIN_IMPROVEMENT:
            best, stale = error, 0
        else:
            stale += 1
        if stale == patience:
            drops, stale = drops + 1, 0
    return min(drops, MAX_DROPS)


def unscheduled_rate(settings: Settings, epoch: float) -> float:
    """Return ε after `epoch` epochs, a fraction, as if there were a warm-up but no schedule."""
    if epoch < settings.warmup_epochs:
        return settings.peak_learning_rate * epoch / settings.warmup_epochs
    return settings.peak_learning_rate


def learning_rate(settings: Settings, epoch: float, errors: Sequence[float]) -> float:
    """Return ε for a step that ends after `epoch` epochs, a fraction, given the validation errors so far."""
    rate = unscheduled_rate(settings, epoch)
    if epoch < settings.warmup_epochs:
        return rate
    if settings.schedule == "plateau":
        return rate * DROP ** plateau_drops(errors, settings.patience)
    if settings.schedule == "steps":
        return rate * DROP ** sum(epoch >= drop for drop in settings.drop_epochs)
    fraction = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return rate * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2
