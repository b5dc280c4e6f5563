"""The fast implementations of ReLU, normalisation and pooling compared with the plain one."""

from functools import partial

import pytest
import torch
from torch import Tensor

from model import fused
from model.fused import normalise_and_pool, reference_normalise_and_pool
from tests.model import stages
from tests.model.stages import result_and_gradient

activations = partial(stages.activations, dtype=torch.float64)

# The stages of both presets and of experiments, with a larger α, so the normalisation has an effect.
STAGES = [
    pytest.param({"alpha": 1e-3}, id="paper"),
    pytest.param({"alpha": 1e-3, "towers": 2, "relu_first": False}, id="code2012-1"),
    pytest.param({"alpha": 1e-3, "towers": 2, "spatial_norm": True}, id="code2012-2"),
    pytest.param({"alpha": None}, id="no-lrn"),
    pytest.param({"alpha": 1e-3, "window": 2}, id="no-overlap"),
    pytest.param({"alpha": 1e-3, "relu_first": False, "activation": torch.tanh}, id="tanh"),
]


@pytest.fixture(autouse=True)
def _without_the_kernel(monkeypatch):
    monkeypatch.setattr(fused, "_has_cpu_kernel", lambda: False)


@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize("images", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_of_a_batch_give_the_same_result_as_the_whole(options, images, dtype, monkeypatch):
    x = activations(8, 12, 9, 8, dtype=dtype)
    monkeypatch.setattr(fused, "SLICE_BYTES", images * x[0].numel() * x.element_size())
    output, gradient = result_and_gradient(normalise_and_pool, x, **options)
    expected, expected_gradient = result_and_gradient(reference_normalise_and_pool, x, **options)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    # The operations and their order are the same; only the ends of vectorised loops may differ.
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("options", STAGES)
def test_gradient_by_finite_differences(options, monkeypatch):
    x = activations(2, 4, 5, 5)
    monkeypatch.setattr(fused, "SLICE_BYTES", 1)
    assert torch.autograd.gradcheck(lambda x: normalise_and_pool(x, **options), x, fast_mode=True)


@pytest.mark.parametrize("options", STAGES)
def test_a_bias_is_added_first(options):
    x, bias = activations(2, 12, 9, 9), activations(12, 1, 1, 1).flatten()
    output, gradient = result_and_gradient(
        lambda bias, **o: normalise_and_pool(x, bias=bias, **o), bias, **options
    )
    sums = x + bias[:, None, None]
    expected, expected_gradient = result_and_gradient(reference_normalise_and_pool, sums, **options)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, expected_gradient.sum((0, 2, 3)))


def test_only_the_input_is_saved_for_the_backward_pass():
    x, kept = activations(2, 8, 9, 9), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        normalise_and_pool(x, alpha=1e-3)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@pytest.mark.filterwarnings("ignore:no fused GPU kernels", "error:Dynamo detected a call to a")
def test_the_compiler_treats_the_presence_of_kernels_as_a_constant():
    def negated(x: Tensor) -> Tensor:
        return -x if fused._has_gpu_kernels() else x

    x = torch.ones(1)
    torch.compile(negated, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_has_an_empty_result(dtype):
    x = torch.zeros(0, 4, 5, 5, dtype=dtype, requires_grad=True)
    output = normalise_and_pool(x, 1e-4)
    assert output.shape == (0, 4, 2, 2)
    output.sum().backward()
    assert x.grad.shape == x.shape
