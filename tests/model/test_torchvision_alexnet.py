"""torchvision's net compared with a forward pass in torch's own layers, and its state dict."""

import pytest
import torch
from torch import nn

from model.alexnet import count_macs, count_parameters
from model.torchvision_alexnet import (
    INPUT_MEAN,
    MEAN,
    STD,
    TorchvisionAlexNet,
    from_torchvision,
    to_torchvision,
)


class Theirs(nn.Module):
    """The net of "One weird trick" for which torchvision publishes weights."""

    def __init__(self, classes: int):
        super().__init__()
        relu, pool = nn.ReLU(), nn.MaxPool2d(3, 2)
        convolutions = [
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.Conv2d(256, 256, 3, padding=1),
        ]
        c1, c2, c3, c4, c5 = convolutions
        self.features = nn.Sequential(c1, relu, pool, c2, relu, pool, c3, relu, c4, relu, c5, relu, pool)
        fc6, fc7, fc8 = nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, classes)
        self.classifier = nn.Sequential(nn.Dropout(), fc6, relu, nn.Dropout(), fc7, relu, fc8)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (6, 6))
        return self.classifier(torch.flatten(x, 1))


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    return Theirs(10).eval()


def ours_with(state: dict) -> TorchvisionAlexNet:
    net = TorchvisionAlexNet(len(state["classifier.6.bias"]))
    net.load_state_dict(from_torchvision(state), assign=True)  # saves the memory of a copy
    return net.eval()


@pytest.mark.parametrize("crop", [224, 64])
@torch.inference_mode()
def test_the_logits_equal_those_of_torchvisions_forward_pass(theirs, crop):
    raw = torch.randint(256, (3, 3, crop, crop), generator=torch.Generator().manual_seed(1)).float()
    mean, std, input_mean = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD, INPUT_MEAN))
    expected = theirs((raw / 255 - mean) / std)
    assert expected.std() > 1e-3
    ours = ours_with(theirs.state_dict())
    torch.testing.assert_close(ours(raw - input_mean), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.fc8(ours.features(raw - input_mean)), expected, rtol=1e-4, atol=1e-6)


def test_the_state_dict_is_unchanged_by_a_round_trip(theirs):
    before = theirs.state_dict()
    after = to_torchvision(ours_with(before).to(memory_format=torch.channels_last).state_dict())
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].is_contiguous()


def test_the_net_has_the_published_size():
    with torch.device("meta"):
        net = TorchvisionAlexNet()
    assert count_parameters(net) == 61_100_840
    assert count_macs(net) == 714_188_480


def test_another_state_dict_is_refused_by_name_or_shape(theirs):
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"those of torchvision's alexnet: classifier.6.bias"):
        from_torchvision({name: value for name, value in state.items() if name != "classifier.6.bias"})
    with pytest.raises(ValueError, match=r"conv1.weight has shape \[96, 3, 11, 11\], but \[64, 3, 11, 11\]"):
        from_torchvision({**state, "features.0.weight": torch.zeros(96, 3, 11, 11)})
