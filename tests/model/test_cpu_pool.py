"""The CPU kernel compared with the plain implementation."""

import subprocess
import sys
from functools import partial

import pytest
import torch

import model
from model import cpu_pool
from model.alexnet import AlexNet
from model.fused import normalise_and_pool, reference_normalise_and_pool
from tests.model import stages
from tests.model.stages import ALPHA

activations = partial(stages.activations, dtype=torch.float32)
result_and_gradient = partial(stages.result_and_gradient, alpha=ALPHA)

STAGES = [
    pytest.param({"towers": 1, "relu_first": True}, id="paper"),
    pytest.param({"towers": 2, "relu_first": False}, id="code2012-1"),
    pytest.param({"towers": 2, "relu_first": True, "spatial_norm": True}, id="code2012-2"),
    pytest.param({"towers": 1, "relu_first": False, "spatial_norm": True}, id="other"),
]
# Kernel and plain implementation each round once.
TYPES = [pytest.param(torch.float32, 1e-6, id="fp32"), pytest.param(torch.bfloat16, 2**-7, id="bf16")]
# One channel per tower, one more than a vector, odd sides, the smallest maps, and the maps of the net.
SHAPES = [(2, 2, 7, 5), (1, 34, 4, 9), (3, 6, 3, 3), (1, 32, 12, 3), (2, 96, 55, 55), (1, 256, 27, 27)]


@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_the_plain_implementation(options, dtype, tolerance, shape):
    x = activations(*shape, dtype=dtype)
    output, gradient = result_and_gradient(normalise_and_pool, x, **options)
    expected, expected_gradient = result_and_gradient(reference_normalise_and_pool, x, **options)
    assert output.dtype == gradient.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("options", STAGES)
def test_the_gradient_equals_that_of_the_plain_implementation_in_fp64(options):
    x = activations(2, 32, 27, 27)
    _, gradient = result_and_gradient(normalise_and_pool, x, **options)
    _, expected = result_and_gradient(
        reference_normalise_and_pool, x.detach().double().requires_grad_(), **options
    )
    assert (gradient - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_bitwise_the_same_with_any_number_of_threads(options, dtype):
    x, threads, results = activations(5, 12, 9, 8, dtype=dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(result_and_gradient(normalise_and_pool, x, **options))
    finally:
        torch.set_num_threads(threads)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is there code for several processors")
@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_bitwise_the_same_on_every_processor(options, dtype, plainest, monkeypatch):
    x = activations(2, 34, 9, 8, dtype=dtype)
    expected = result_and_gradient(normalise_and_pool, x, **options)
    monkeypatch.setattr(cpu_pool, "_LIBRARY", plainest)
    for found, wanted in zip(result_and_gradient(normalise_and_pool, x, **options), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def plainest(tmp_path_factory):
    """The kernel compiled without vector instructions, and for a single kind of processor."""
    library = tmp_path_factory.mktemp("plainest") / "library.so"
    source = cpu_pool.__file__.removesuffix(".py") + ".c"
    flags = ["-O1", "-ffp-contract=off", "-U__gnu_linux__", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    return cpu_pool.open_library(str(library))


def test_the_first_of_equal_values_gets_the_gradient_and_the_relu_has_none_at_zero():
    x = torch.ones(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    x[:, 2:] = 0
    _, gradient = result_and_gradient(normalise_and_pool, x.requires_grad_())
    assert (gradient != 0).nonzero()[:, 1:].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_a_relu_that_comes_last_cuts_off_negative_values_and_their_gradient():
    x = -torch.ones(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    output, gradient = result_and_gradient(normalise_and_pool, x.requires_grad_(), relu_first=False)
    assert not output.any()
    assert not gradient.any()


@pytest.mark.parametrize("options", STAGES)
def test_no_gradient_passes_where_a_maximum_is_exactly_zero(options):
    """As in black parts of pictures, whose mean is not subtracted, if biases are 0."""
    x = torch.zeros(1, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    for function in (normalise_and_pool, reference_normalise_and_pool):
        _, gradient = result_and_gradient(function, x, **options)
        assert not gradient.any()


@pytest.mark.parametrize("options", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_values_that_are_not_finite_propagate_as_in_the_plain_implementation(options, dtype, value):
    x = activations(1, 8, 7, 7, dtype=dtype)
    with torch.no_grad():
        x[0, 3, 2, 2] = value
    output, _ = result_and_gradient(normalise_and_pool, x, **options)
    expected, _ = result_and_gradient(reference_normalise_and_pool, x, **options)
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-3, equal_nan=True)


def test_only_the_input_and_a_byte_per_output_are_saved_for_the_backward_pass():
    x, kept = activations(2, 8, 9, 9), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        output = normalise_and_pool(x, ALPHA)
    assert kept[0].data_ptr() == x.data_ptr()
    assert [(tensor.dtype, tensor.shape) for tensor in kept[1:]] == [(torch.uint8, output.shape)]


def test_maps_may_have_any_memory_layout():
    x = activations(2, 8, 9, 10)
    expected = result_and_gradient(normalise_and_pool, x)
    wide = torch.zeros(2, 24, 9, 20)
    wide[:, 8:16, :, ::2] = x.detach()
    for same in (x.detach().contiguous(), wide[:, 8:16, :, ::2]):
        output, gradient = result_and_gradient(normalise_and_pool, same.requires_grad_())
        assert torch.equal(output, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("options", STAGES)
def test_the_operator_passes_torchs_own_check(options):
    given = {"spatial_norm": False} | options
    torch.library.opcheck(cpu_pool.normalise_and_pool, (activations(2, 4, 5, 6), ALPHA), given)


@pytest.mark.parametrize("preset", ["paper", "code2012"])
def test_compiled_and_exported_nets_compute_the_same(preset):
    torch.manual_seed(0)
    net, x = AlexNet(classes=3, preset=preset, crop=64).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), expected)
        program = torch.export.export(net, (x,))
        torch.testing.assert_close(program.module()(x), expected)
    assert "alexnet" not in str(program.graph)


def test_without_the_kernel_the_result_is_the_same_and_a_warning_is_given(monkeypatch):
    x = activations(2, 12, 9, 8)
    expected = result_and_gradient(normalise_and_pool, x)
    monkeypatch.delattr(model, "cpu_pool")
    monkeypatch.delitem(sys.modules, "model.cpu_pool")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match="no compiled CPU kernel, so the net will be slower: it was not built"
    ):
        found = result_and_gradient(normalise_and_pool, x)
    torch.testing.assert_close(found, expected)
