"""The stock net of the stage `model` computes the same as ours, and its step trains."""

import pytest
import torch

from model.alexnet import AlexNet
from tools.benchmarks.stock import LAYOUTS, stock_alexnet, stock_work


def test_the_stock_net_equals_ours_if_the_inputs_of_fc6_are_permuted():
    torch.manual_seed(0)
    ours, stock = AlexNet(10, "paper", "inverted").eval(), stock_alexnet(10).eval()
    state = [parameter.detach() for parameter in ours.parameters()]
    hwc = state[10].view(4096, 6, 6, 256)  # after five convolutions' weights and biases
    state[10] = hwc.permute(0, 3, 1, 2).flatten(1)
    stock.load_state_dict(dict(zip(stock.state_dict(), state, strict=True)))
    x = 255 * torch.rand(2, 3, 224, 224) - 127.5
    with torch.inference_mode():
        torch.testing.assert_close(stock(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "compiled"),
    [*((layout, False) for layout in LAYOUTS), pytest.param("channels_last", True, marks=pytest.mark.slow)],
)
def test_a_step_of_the_stock_net_counts_its_images(layout, compiled):
    work = stock_work(torch.zeros(2, 3, 67, 67), torch.tensor([3, 4]), 10, layout, "fp32", compiled)
    assert work() == 2
