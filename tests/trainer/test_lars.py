"""LARS, compared with the formula of arXiv:1708.03888 in plain numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer import checkpoint
from trainer.lars import Lars
from trainer.optim import make_optimizer, set_learning_rate
from trainer.settings import Settings

TRUST, DECAY, MOMENTUM = 0.02, 0.005, 0.9
RATES = (2.0, 2.0, 5.0, 5.0, 0.5, 1.0)
SETTINGS = Settings(
    optimizer="lars",
    trust_coefficient=TRUST,
    weight_decay=DECAY,
    momentum=MOMENTUM,
    bias_learning_rate=0.1,
    bias_decay=False,
    layer_learning_rates={"fc7": 0.5},
)


class Layers(nn.Module):
    """Layers of several kinds; the weights of fc8 are zero at first."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc6, self.fc7, self.fc8 = (nn.Linear(5, 6) for _ in range(3))
        nn.init.zeros_(self.fc8.weight)
        self.to(torch.float64).to(memory_format=torch.channels_last)


def gradients(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of all steps; in the second and third, fc6 has none."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    steps = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in RATES
    ]
    for step in steps[1:3]:
        step["fc6.weight"].zero_()
    return steps


def layers() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = Layers()
    return model, make_optimizer(model, SETTINGS)


def train(
    model: nn.Module, optimizer: torch.optim.SGD, steps: range = range(len(RATES)), scale: float = 1.0
) -> None:
    """Do some of the steps. scale: factor on the gradients, such as that of GradScaler."""
    given = gradients(model)
    for step in steps:
        set_learning_rate(optimizer, RATES[step])
        for name, parameter in model.named_parameters():
            parameter.grad = torch.empty_like(parameter).copy_(scale * given[step][name])  # same strides
        optimizer.step()


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def test_the_update_is_the_formula_in_numpy():
    """Weights have  v ← m·v + γ·λ·(g + β·w),  w ← w − v;  parameters of one dimension have λ = 1, β = 0."""
    model, optimizer = layers()
    expected, given = weights(model), gradients(model)
    v = {name: np.zeros_like(w) for name, w in expected.items()}
    for step, gamma in enumerate(RATES):
        for name, w in expected.items():
            g = given[step][name].numpy()
            if w.ndim == 1:
                rate, change = 0.1 * gamma, g
            else:
                norm, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
                local = TRUST * norm / (slope + DECAY * norm) if norm and slope else 1.0
                rate, change = gamma * local, g + DECAY * w
            if name.startswith("fc7"):
                rate *= 0.5
            v[name] = MOMENTUM * v[name] + rate * change
            expected[name] = w - v[name]
    train(model, optimizer)
    for name, found in weights(model).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-12, err_msg=name)


def test_a_step_without_momentum_moves_each_layer_by_the_trust_coefficient():
    model, _ = layers()
    before = weights(model)
    optimizer = make_optimizer(model, SETTINGS.model_copy(update={"momentum": 0.0, "weight_decay": 0.0}))
    train(model, optimizer, range(1))
    for name, share in (("conv1.weight", 1.0), ("fc6.weight", 1.0), ("fc7.weight", 0.5)):
        moved = np.linalg.norm(weights(model)[name] - before[name])
        assert moved == pytest.approx(share * RATES[0] * TRUST * np.linalg.norm(before[name])), name


def test_a_run_continues_from_a_checkpoint_bit_for_bit(tmp_path):
    (whole, optimizer), (first, interrupted), (second, continued) = (layers() for _ in range(3))
    train(whole, optimizer)
    train(first, interrupted, range(3))
    state = {"step": 3, "model": first.state_dict(), "optimizer": interrupted.state_dict()}
    checkpoint.write(tmp_path, 3, state, keep=1)
    loaded, _ = checkpoint.load(tmp_path, torch.device("cpu"))
    second.load_state_dict(loaded["model"])
    continued.load_state_dict(loaded["optimizer"])
    train(second, continued, range(3, len(RATES)))
    for name, found in weights(second).items():
        np.testing.assert_array_equal(found, weights(whole)[name], err_msg=name)


@pytest.mark.parametrize("overflows", [False, True])
def test_the_loss_scale_of_fp16_changes_nothing_but_skips_overflows(overflows):
    (plain, optimizer), (scaled, other) = layers(), layers()
    before = weights(scaled)
    train(plain, optimizer, range(1))
    other.grad_scale, other.found_inf = torch.tensor(1024.0), torch.tensor(float(overflows))
    train(scaled, other, range(1), scale=1024.0)
    expected = before if overflows else weights(plain)
    for name, found in weights(scaled).items():
        np.testing.assert_allclose(found, expected[name], rtol=0 if overflows else 1e-12, err_msg=name)


def test_only_weights_with_several_dimensions_are_scaled():
    model, optimizer = layers()
    assert isinstance(optimizer, Lars)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if "trust_coefficient" in group]
    scaled = {names[id(parameter)] for group in groups for parameter in group["params"]}
    assert scaled == {"conv1.weight", "fc6.weight", "fc7.weight", "fc8.weight"}
    assert type(make_optimizer(model, Settings())) is torch.optim.SGD
