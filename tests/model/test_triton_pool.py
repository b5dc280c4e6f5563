"""The Triton kernels compared with the plain implementation, on a GPU or in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import wrap_triton

from model import fused
from tests.model import stages
from tests.model.stages import ALPHA

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported for the first time
pytest.importorskip("triton", reason="Triton is not installed")

from model import triton_pool, triton_spatial  # noqa: E402


def interprets() -> bool:
    """Return whether this version of torch accepts an interpreted Triton kernel; 2.11 does not."""
    try:
        wrap_triton(triton_pool._pool)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not GPU and not interprets(), reason="this version of torch runs no kernels in Triton's interpreter"
)
DEVICE = torch.device("cuda" if GPU else "cpu")
activations = partial(stages.activations, dtype=torch.float32, device=DEVICE)
STAGES = [
    pytest.param({"towers": 1, "relu_first": True}, id="paper"),
    pytest.param({"towers": 2, "relu_first": False}, id="code2012-1"),
    pytest.param({"towers": 2, "relu_first": True}, id="towers"),
    pytest.param({"towers": 2, "relu_first": True, "spatial_norm": True}, id="code2012-2"),
]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="Triton's interpreter truncates bf16 instead of rounding"),
]
# Both round once; in fp32, the kernel uses approximate roots and another order of sums.
TOLERANCES = [
    pytest.param(torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.float16, 2**-10, id="fp16"),
    pytest.param(torch.bfloat16, 2**-7, id="bf16", marks=on_gpu),
]


def kernel(x: Tensor, bias: Tensor, towers: int, relu_first: bool, spatial_norm: bool = False) -> Tensor:
    kernels = triton_spatial if spatial_norm else triton_pool
    return kernels.normalise_and_pool(x, bias, ALPHA, towers, relu_first)[0]


def assert_same(x: Tensor, tolerance: float, **options) -> None:
    bias = 30 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0))
    bias = bias.round().to(x.device).requires_grad_()
    output = kernel(x, bias, **options)
    expected = fused.reference_normalise_and_pool(x, ALPHA, bias=bias, **options)
    assert output.dtype == x.dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    gradient, of_bias = torch.autograd.grad(output, (x, bias), weights)
    expected, expected_of_bias = torch.autograd.grad(expected, (x, bias), weights)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=4 * tolerance)  # sums of up to four
    # Errors of single pixels; the plain implementation sums rounded gradients.
    pixels = x[:, 0].numel()
    torch.testing.assert_close(of_bias, expected_of_bias, rtol=tolerance, atol=4 * tolerance * pixels**0.5)


@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
# Towers of less than a group and of whole groups; more rows than a block; more channels than a warp.
@pytest.mark.parametrize("shape", [(1, 12, 5, 12), (1, 48, 30, 4), (1, 528, 3, 4)])
def test_kernels_equal_the_plain_implementation(options, shape, dtype, tolerance):
    assert_same(activations(*shape, dtype=dtype), tolerance, **options)


@pytest.mark.parametrize("options", STAGES)
def test_windows_do_not_cross_the_edges_of_full_towers_and_of_images(options):
    assert_same(activations(2, 16, 3, 5), 1e-5, **options)


def test_the_first_of_equal_values_gets_the_gradient_and_the_relu_has_none_at_zero():
    x = activations(1, 4, 7, 7).detach().mul(0.05).round()  # few values, many of them 0
    assert_same(x.requires_grad_(), 1e-5, towers=1, relu_first=True)
    assert_same(x, 1e-5, towers=1, relu_first=False)
    assert_same(x, 1e-5, towers=1, relu_first=False, spatial_norm=True)


def test_nan_propagates():
    x = activations(1, 8, 5, 5).detach()
    x[0, 3, 2, 2] = torch.nan
    for options in ({"relu_first": True}, {"relu_first": False}, {"relu_first": True, "spatial_norm": True}):
        expected = fused.reference_normalise_and_pool(x, ALPHA, **options)
        assert torch.equal(kernel(x, torch.zeros(8, device=DEVICE), 1, **options).isnan(), expected.isnan())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second is CUDA graphs
@pytest.mark.parametrize("spatial_norm", [False, True])
def test_a_compiled_step_equals_the_eager_one(mode, spatial_norm):
    x = activations(4, 96, 55, 55, dtype=torch.bfloat16)

    def loss(x: Tensor) -> Tensor:
        return fused.normalise_and_pool(x * 2, ALPHA, spatial_norm=spatial_norm).float().square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    for _ in range(3):  # warm-up, capture, replay
        (gradient,) = torch.autograd.grad(torch.compile(loss, mode=mode, fullgraph=True)(x), x)
        torch.testing.assert_close(gradient, expected)
