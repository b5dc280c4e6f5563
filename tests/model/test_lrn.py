"""Response normalisation compared with naive loops, torch's own layer and finite differences."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.lrn import local_response_norm, spatial_response_norm


def images(*shape: int, scale: float = 30.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal values, large enough for the sum of squares to contribute as much as k."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def naive_channel_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, towers: int) -> np.ndarray:
    """Normalise as in section 3.3 of the paper, channel by channel; a window ends where its tower does."""
    a, b = x.double().numpy(), np.empty(x.shape)
    channels = a.shape[1]
    width = channels // towers
    for i in range(channels):
        first = i // width * width
        window = a[:, max(first, i - size // 2) : min(first + width, i + size // 2 + 1)]
        b[:, i] = a[:, i] / (k + alpha * (window**2).sum(1)) ** beta
    return b


def naive_spatial_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """Normalise pixel by pixel; the part of a window outside the map counts as zeros."""
    a, b = x.double().numpy(), np.empty(x.shape)
    for y in range(a.shape[2]):
        for x_ in range(a.shape[3]):
            rows = slice(max(0, y - size // 2), y + size // 2 + 1)
            columns = slice(max(0, x_ - size // 2), x_ + size // 2 + 1)
            squares = (a[:, :, rows, columns] ** 2).sum((2, 3))
            b[:, :, y, x_] = a[:, :, y, x_] / (k + alpha / size**2 * squares) ** beta
    return b


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_channel_norm_is_the_papers_formula(size, beta, towers):
    x = images(2, 12, 3, 4)
    ours = local_response_norm(x, size, alpha=1e-3, beta=beta, k=1.5, towers=towers)
    expected = naive_channel_norm(x, size, alpha=1e-3, beta=beta, k=1.5, towers=towers)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_defaults_are_those_of_the_paper():
    x = images(1, 9, 2, 2)
    expected = naive_channel_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0, towers=1)
    np.testing.assert_allclose(local_response_norm(x), expected, rtol=1e-12)


def test_alpha_multiplies_the_sum_whereas_torch_averages():
    x = images(2, 96, 5, 5)
    ours = local_response_norm(x, alpha=1e-4)
    torch.testing.assert_close(
        ours, nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(x), rtol=1e-12, atol=0
    )
    averaged = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)(x)
    assert ((ours - averaged).abs() > 0.01 * averaged.abs()).double().mean() > 0.9


def test_code2012_is_torchs_layer_on_each_tower():
    x = images(2, 96, 5, 5)
    ours = local_response_norm(x, alpha=1e-4 / 5, towers=2)
    layer = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
    torch.testing.assert_close(
        ours, torch.cat([layer(half) for half in x.chunk(2, 1)], 1), rtol=1e-12, atol=0
    )


def test_towers_change_only_channels_46_to_49_of_96():
    x = images(2, 96, 5, 5)
    differs = (local_response_norm(x, towers=1) != local_response_norm(x, towers=2)).any(0).any(-1).any(-1)
    assert differs.nonzero().flatten().tolist() == [46, 47, 48, 49]  # their windows cross channel 48


@pytest.mark.parametrize("beta", [0.75, 0.6])
@pytest.mark.parametrize("towers", [1, 2])
def test_channel_norm_gradient(towers, beta):
    x = images(2, 8, 2, 3, scale=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 5, 0.3, beta, 1.0, towers), x)


@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_spatial_norm_gradient(beta):
    x = images(2, 2, 5, 4, scale=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spatial_response_norm(x, 3, 0.3, beta), x)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (7, 6)])
@pytest.mark.parametrize("size", [3, 5])
def test_spatial_norm_divides_by_the_whole_window(size, height, width):
    x = images(2, 3, height, width)
    expected = naive_spatial_norm(x, size, alpha=1e-3, beta=0.75, k=1.0)
    np.testing.assert_allclose(spatial_response_norm(x, size), expected, rtol=1e-12)


NORMS = [
    pytest.param(local_response_norm, {}, id="channels"),
    pytest.param(local_response_norm, {"alpha": 2e-5, "towers": 2}, id="towers"),
    pytest.param(spatial_response_norm, {}, id="spatial"),
]


@pytest.mark.parametrize(("norm", "options"), NORMS)
def test_squares_beyond_the_range_of_fp16_do_not_overflow(norm, options):
    x = torch.where(images(2, 16, 7, 7) > 0, 600.0, -600.0).half()
    assert (x * x).isinf().all()
    ours = norm(x, **options)
    assert ours.dtype == torch.float16
    # One rounding to fp16, which has 11 significant bits.
    torch.testing.assert_close(ours.double(), norm(x.double(), **options), rtol=1.01 * 2**-11, atol=0)


@pytest.mark.parametrize(("norm", "options"), NORMS)
def test_bf16_is_rounded_once(norm, options):
    x = images(2, 16, 7, 7, dtype=torch.bfloat16)
    ours = norm(x, **options)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), norm(x.double(), **options), rtol=1.01 * 2**-8, atol=0)


@pytest.mark.parametrize(("norm", "options"), NORMS)
def test_autocast_does_not_lower_the_precision(norm, options):
    x = images(2, 16, 7, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = norm(x, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), norm(x.double(), **options), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "options"), NORMS)
def test_gradient_has_the_type_of_the_input(norm, options):
    x = images(2, 16, 7, 7, dtype=torch.bfloat16).requires_grad_()
    norm(x, **options).sum().backward()
    exact = x.detach().double().requires_grad_()
    norm(exact, **options).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("norm", "options"), NORMS)
def test_channels_last_is_preserved(norm, options):
    x = images(2, 16, 7, 7, dtype=torch.float32)
    ours = norm(x.contiguous(memory_format=torch.channels_last), **options)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, norm(x, **options), rtol=1e-6, atol=0)
