"""A small residual net, and factories that are wrong in one way each, to be trained with --net."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions whose result is added to their input, as in ResNet-18."""

    def __init__(self, channels: int, kernels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, kernels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(kernels)
        self.conv2 = nn.Conv2d(kernels, kernels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(kernels)
        self.shortcut = nn.Conv2d(channels, kernels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual net of two blocks."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 8, 1)
        self.layer2 = Block(8, 16, 2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(maps.mean((2, 3)))


def partly_frozen(classes: int) -> nn.Module:
    net = ResNet(classes)
    net.layer1.requires_grad_(False)
    return net


class Changed(ResNet):
    """The net with another output."""

    def __init__(self, classes: int, change):
        super().__init__(classes)
        self.change = change

    def forward(self, x: Tensor):
        return self.change(super().forward(x))


def unused(classes: int) -> nn.Module:
    net = ResNet(classes)
    net.extra = nn.Linear(2, 2)
    return net


def more_classes(classes: int) -> nn.Module:
    return ResNet(classes + 1)


def two_outputs(classes: int) -> nn.Module:
    return Changed(classes, lambda logits: (logits, logits))


def ranked(classes: int) -> nn.Module:
    return Changed(classes, lambda logits: logits.argsort(1))


class Contiguous(ResNet):
    """A net that takes only contiguous pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), -1).view_as(x))


def unsized(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def in_half(classes: int) -> nn.Module:
    return ResNet(classes).half()


def frozen(classes: int) -> nn.Module:
    return ResNet(classes).requires_grad_(False)


def raising(classes: int) -> nn.Module:
    raise KeyError(f"no weights for {classes} classes")


def nothing(classes: int) -> None:
    return None


NUMBER = 3
