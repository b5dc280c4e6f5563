"""Define torchvision's `alexnet`, which differs from the paper's net, and convert its state dict.

It has 64/192/384/256/256 kernels in one tower, no response normalisation, 2 pixels of padding at conv1,
dropout on the inputs of fc6 and fc7 instead of their outputs, and average pooling to 6×6 for any crop. It has
61,100,840 parameters at 1000 classes.

torchvision's input is (x / 255 − MEAN) / STD. The input of TorchvisionAlexNet is x minus a mean, and the net
itself divides by 255 · STD. The weights are bitwise those of torchvision. The results are the same up to
rounding if the mean is INPUT_MEAN, since the zeros of the padding then stand for the same colour in both. Any
other mean would change the results at the borders, so users of these weights must subtract INPUT_MEAN.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import DROPOUTS, AlexNet, Variant

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, on the 0–1 scale
INPUT_MEAN = (255 * MEAN[0], 255 * MEAN[1], 255 * MEAN[2])
NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}
SIDE = 6  # of the input maps of fc6
_KINDS = ("weight", "bias")


class TorchvisionAlexNet(AlexNet):
    """torchvision's net, with torch's default initial weights drawn from its global generator.

    classes, dropout: as in AlexNet; torchvision's dropout is `inverted`. Input: [N,3,crop,crop] on the raw
    0–255 scale, minus a mean.
    """

    scale: Tensor

    def __init__(self, classes: int = 1000, dropout: str = "inverted"):
        nn.Module.__init__(self)  # does not create the paper's layers
        self.variant = Variant(lrn=False, towers=1)
        self.register_buffer("scale", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=2)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.fc6 = nn.Linear(256 * SIDE * SIDE, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.drop6 = DROPOUTS[dropout]()
        self.drop7 = DROPOUTS[dropout]()
        self.pool = nn.MaxPool2d(3, stride=2)

    def features(self, x: Tensor) -> Tensor:
        """Map [N,3,crop,crop] to the input of fc8 [N,4096]. Shapes below are those of a 224-px crop."""
        x = self.pool(F.relu(self.conv1(x / self.scale)))  # [N,64,27,27]
        x = self.pool(F.relu(self.conv2(x)))  # [N,192,13,13]
        x = F.relu(self.conv3(x))  # [N,384,13,13]
        x = F.relu(self.conv4(x))  # [N,256,13,13]
        x = self.pool(F.relu(self.conv5(x)))  # [N,256,6,6]
        x = F.adaptive_avg_pool2d(x, SIDE)
        x = x.permute(0, 2, 3, 1).flatten(1)  # [N,9216]
        x = F.relu(self.fc6(self.drop6(x)))
        return F.relu(self.fc7(self.drop7(x)))


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's state dict to the names and the order of TorchvisionAlexNet.

    Raises ValueError if the names or shapes are not those of torchvision's net.
    """
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in NAMES.items() for kind in _KINDS}
    if state.keys() != names.keys():
        differing = ", ".join(sorted(state.keys() ^ names.keys())[:3])
        raise ValueError(f"its names differ from those of torchvision's alexnet: {differing}")
    ours = {names[name]: value for name, value in state.items()}
    classes = ours["fc8.bias"].numel()
    with torch.device("meta"):
        expected = TorchvisionAlexNet(classes).state_dict()
    for name, value in ours.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, but {list(expected[name].shape)} in torchvision's net"
            )
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} holds integers, or numbers that are not finite")
    # torchvision flattens the input of fc6 channel by channel; this net flattens it pixel by pixel.
    ours["fc6.weight"] = ours["fc6.weight"].unflatten(1, (-1, SIDE, SIDE)).permute(0, 2, 3, 1).flatten(1)
    return ours


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a TorchvisionAlexNet's state dict to torchvision's, with contiguous tensors."""
    theirs = {f"{NAMES[layer]}.{kind}": state[f"{layer}.{kind}"] for layer in NAMES for kind in _KINDS}
    weight = theirs["classifier.1.weight"].unflatten(1, (SIDE, SIDE, -1)).permute(0, 3, 1, 2).flatten(1)
    return {name: value.contiguous() for name, value in {**theirs, "classifier.1.weight": weight}.items()}
