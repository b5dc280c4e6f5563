"""Define the AlexNet that Caffe publishes as bvlc_alexnet, and convert the weights of its layers.

Its layers are those of the paper's net, with the normalisation of Caffe: α = 1e-4 is divided by the size of
the window, and k is 1. It does not pad conv1, and rounds the number of pooling windows up: 224 px give maps
of 54, 27, 13 and 6, and 227 px, Caffe's own crop, give 55, 27, 13 and 6.

Caffe's input is BGR, and fc6 takes its maps channel by channel. This net takes RGB, and maps pixel by pixel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.lrn import local_response_norm

INPUT_MEAN = (123.0, 117.0, 104.0)  # RGB, on the 0–255 scale
NAMES = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
_SMALLEST = 64  # crop for which fc6 is small


class BvlcAlexNet(AlexNet):
    """Caffe's net, with initial weights as in the paper, drawn from torch's global generator.

    classes, dropout, crop: as in AlexNet; Caffe's dropout is `inverted`. Input: [N,3,crop,crop] in RGB on the
    raw 0–255 scale, minus a mean.
    """

    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d

    def __init__(self, classes: int = 1000, dropout: str = "inverted", crop: int = 227):
        super().__init__(classes, "paper", dropout, _SMALLEST)
        side = (crop - 11) // 4 + 1
        for _ in range(3):
            side = -(-(side - 3) // 2) + 1
        self.fc6 = nn.Linear(256 * side * side, 4096)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.reset_parameters()

    def features(self, x: Tensor) -> Tensor:
        """Map [N,3,crop,crop] to the input of fc8 [N,4096]. Shapes below are those of a 227-px crop."""
        x = self.pool(_normalise(F.relu(self.conv1(x))))  # [N,96,27,27]
        x = self.pool(_normalise(F.relu(self.conv2(x))))  # [N,256,13,13]
        for layer in (self.conv3, self.conv4, self.conv5):
            x = F.relu(layer(x))
        x = self.pool(x)  # [N,256,6,6]
        x = x.permute(0, 2, 3, 1).flatten(1)  # [N,9216]
        x = self.drop6(F.relu(self.fc6(x)))
        return self.drop7(F.relu(self.fc7(x)))


def _normalise(x: Tensor) -> Tensor:
    return local_response_norm(x, size=5, alpha=1e-4 / 5, beta=0.75, k=1.0)


def from_caffe(state: Mapping[str, Tensor], crop: int) -> dict[str, Tensor]:
    """Convert the weights of Caffe's net, under the names of NAMES, to those of BvlcAlexNet.

    Raises ValueError if their shapes are not those of Caffe's net for the crop, or if they are not finite.
    """
    with torch.device("meta"):
        expected = BvlcAlexNet(len(state["fc8.bias"]), crop=crop).state_dict()
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}, but {list(value.shape)} in Caffe's AlexNet"
            )
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise ValueError(f"{name} holds integers, or numbers that are not finite")
    maps = state["fc6.weight"].unflatten(1, (256, -1))
    side = round(maps.shape[2] ** 0.5)
    return {
        **state,
        "conv1.weight": state["conv1.weight"].flip(1),
        "fc6.weight": maps.unflatten(2, (side, side)).permute(0, 2, 3, 1).flatten(1),
    }
