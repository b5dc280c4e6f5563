"""The paper's AlexNet built from torch's own layers, with which `alexnet-train bench model` compares.

It computes the same as the preset `paper`, up to rounding, but flattens in CHW order, so fc6's inputs are
permuted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.precision import autocast, prepare

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def stock_alexnet(classes: int, crop: int = 224) -> nn.Sequential:
    """Build a net that maps [N,3,crop,crop] to logits [N,classes]."""
    pad = (11 - crop) % 4

    def normalise() -> nn.Module:
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # torch divides alpha by 5

    net = nn.Sequential(
        nn.ZeroPad2d((0, pad, 0, pad)),
        *(nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(inplace=True), normalise(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(inplace=True), normalise(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        nn.Flatten(),
        *(nn.LazyLinear(4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(4096, classes),
    )
    net(torch.zeros(1, 3, crop, crop))  # the lazy linear layer infers its input size
    return net


def stock_work(
    pixels: Tensor, labels: Tensor, classes: int, layout: str, precision: str, compiled: bool = False
) -> Callable[[], int]:
    """Return a function that does a training step on a ready batch, written as in PyTorch's tutorials.

    pixels: [N,3,crop,crop]. layout: a key of LAYOUTS, for weights and pixels. precision: `bf16`, `fp16`
    or `fp32`. Each call does one step and returns N.
    """
    device, memory_format = pixels.device, LAYOUTS[layout]
    pixels = prepare(pixels, precision).contiguous(memory_format=memory_format)
    model = stock_alexnet(classes, pixels.shape[-1]).to(device)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(model) if compiled else model

    def work() -> int:
        optimizer.zero_grad()
        with autocast(precision, device):
            loss = F.cross_entropy(forward(pixels), labels)
        loss.backward()
        optimizer.step()
        return len(labels)

    return work
