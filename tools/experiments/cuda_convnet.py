"""Two nets of cuda-convnet, the author's code of 2011, as its files of layers and parameters define them.

The files are in the released code (computerhistory/AlexNet-Source-Code): example-layers/layers-18pct.cfg and
layers-conv-local-13pct.cfg, each with a file layer-params of that name. Values not given there are the
defaults of layer.py. All pooling windows are clipped at the border of a map, and average pooling then divides
by the values that are left, which are torch's defaults.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lrn import local_response_norm, spatial_response_norm
from tools.experiments.four_layers import four_layers

MOMENTUM = 0.9
WEIGHT_RATE, BIAS_RATE = 0.001, 0.002
BATCH = 128
FILE = 10_000  # images in one of CIFAR-10's files, each of which ends with a smaller batch


class ResponseNorm(nn.Module):
    """Response normalisation by a function of model/lrn.py."""

    def __init__(self, norm: Callable[..., Tensor], size: int, alpha: float):
        super().__init__()
        self.norm = partial(norm, size=size, alpha=alpha, beta=0.75, k=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LocallyConnected(nn.Module):
    """A 3×3 layer like a convolution with padding 1, but with weights of its own for each position.

    Maps [n,inputs,side,side] to [n,outputs,side,side].
    """

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty(side * side, 9 * inputs, outputs))
        self.bias = nn.Parameter(torch.empty(side * side, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        padded, side = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)), self.side
        shifts = [padded[:, top : top + side, left : left + side] for top, left in np.ndindex(3, 3)]
        patches = torch.cat(shifts, 3).flatten(1, 2).transpose(0, 1)  # [side², n, 9 · inputs]
        y = torch.baddbmm(self.bias, patches, self.weight)
        return y.permute(1, 2, 0).unflatten(2, (side, side))


def weighted(net: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield the weights and the biases of each layer that has them."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, LocallyConnected)):
            yield layer.weight, layer.bias  # type: ignore[misc]  # there is one


def layers_18pct(classes: int, seed: int) -> nn.Sequential:
    """Build the net of layers-18pct.cfg, which maps [n,3,32,32] to logits [n,classes].

    It is the net of Fig. 1 with ReLU, and with normalisation within maps after the first two poolings.
    """
    layers = list(four_layers(classes, "relu", seed))
    for index in (6, 3):  # after the second pooling, and after the first pooling and its ReLU
        layers.insert(index, ResponseNorm(spatial_response_norm, size=3, alpha=5e-5))
    return nn.Sequential(*layers)


def conv_local(classes: int, seed: int, normalise: bool) -> nn.Sequential:
    """Build the net of layers-conv-local-13pct.cfg, which maps [n,3,24,24] to logits [n,classes].

    normalise: whether to normalise across maps after the first pooling and before the second, as
    layers-conv-local-11pct.cfg of cuda-convnet does. That file is not in the release.
    """
    torch.manual_seed(seed)

    def norm() -> list[nn.Module]:
        # layer.py divides the file's scale of .001 by the size.
        return [ResponseNorm(local_response_norm, size=9, alpha=0.001 / 9)] if normalise else []

    net = nn.Sequential(
        # A ReLU gives the same maps after max-pooling as before it, and has fewer values to compute.
        *(nn.Conv2d(3, 64, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(inplace=True)),
        *norm(),  # [n,64,12,12]
        *(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(inplace=True), *norm()),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # [n,64,6,6]
        *(LocallyConnected(64, 32, 6), nn.ReLU(inplace=True)),
        *(LocallyConnected(32, 32, 6), nn.ReLU(inplace=True)),
        nn.Flatten(),
        nn.Linear(32 * 6 * 6, classes),
    )
    for (weight, bias), deviation in zip(weighted(net), (0.0001, 0.01, 0.04, 0.04, 0.01), strict=True):
        nn.init.normal_(weight, std=deviation)
        nn.init.zeros_(bias)
    return net


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    build: returns a net, given the number of classes and the seed. decays: weight decay of each layer with
    weights. epochs, drops: the number of epochs, and those after which rates are divided by 10.
    biases_drop: whether this includes the rate of the biases. crop: side of random crops in pixels, which are
    also reflected, or None for whole images.
    """

    build: Callable[[int, int], nn.Sequential]
    decays: tuple[float, ...]
    epochs: int
    drops: tuple[int, ...]
    biases_drop: bool
    crop: int | None = None

    def rates(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return the rates of weights and biases in an epoch (from 0) of a training of so many epochs.

        The schedule is stretched to `epochs`.
        """
        factor = 0.1 ** sum(epoch >= round(drop * epochs / self.epochs) for drop in self.drops)
        return WEIGHT_RATE * factor, BIAS_RATE * (factor if self.biases_drop else 1)


# layer-params-conv-local-13pct.cfg. The file of the 11 % net says when its rates fell, and that it was only
# the weights' (epsW): for the last 20 of some 500 epochs, here of 100.
_conv_local = partial(
    Recipe, decays=(0, 0, 0.004, 0.004, 0.004), epochs=100, drops=(80, 90), biases_drop=False, crop=24
)
RECIPES = {
    # layer-params-18pct.cfg: "Reduce all learning rates by factor of 10 after 120 epochs. Then another factor
    # of 10 after 10 more epochs."
    "layers-18pct": Recipe(layers_18pct, (0.004, 0.004, 0.004, 1), 140, (120, 130), biases_drop=True),
    "without normalisation": _conv_local(partial(conv_local, normalise=False)),
    "with normalisation": _conv_local(partial(conv_local, normalise=True)),
}


class Update:
    """SGD with momentum as in `Weights::update` of the release's src/weights.cu.

    v ← .9·v − ε·(∂E/∂w + decay·w) and w ← w + v. As ε is inside v, v keeps its size when ε falls, unlike
    the buffer of torch's SGD.
    """

    def __init__(self, net: nn.Module, decays: tuple[float, ...]):
        layers = list(weighted(net))
        self._weights = [
            (weight, torch.zeros_like(weight), decay)
            for (weight, _), decay in zip(layers, decays, strict=True)
        ]
        self._biases = [(bias, torch.zeros_like(bias), 0.0) for _, bias in layers]

    @property
    def velocities(self) -> list[Tensor]:
        return [velocity for _, velocity, _ in (*self._weights, *self._biases)]

    def load(self, velocities: list[Tensor]) -> None:
        """Continue with the velocities of an interrupted training."""
        for velocity, kept in zip(self.velocities, velocities, strict=True):
            velocity.copy_(kept)

    @torch.no_grad()
    def step(self, weight_rate: float, bias_rate: float) -> None:
        """Update the parameters from their gradients, and clear these."""
        for rows, rate in ((self._weights, weight_rate), (self._biases, bias_rate)):
            for parameter, velocity, decay in rows:
                velocity.mul_(MOMENTUM).add_(parameter.grad, alpha=-rate).add_(parameter, alpha=-rate * decay)  # type: ignore[arg-type]
                parameter.add_(velocity)
                parameter.grad = None
