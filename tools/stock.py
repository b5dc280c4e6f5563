"""The paper's AlexNet as one writes it from torch's own layers, the peer of `tools/bench.py model`.

The same computation as the preset `paper`, to rounding; the flattening in CHW order permutes fc6's inputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def stock_alexnet(classes: int) -> nn.Sequential:
    """Maps [N,3,224,224] to logits [N,classes]."""

    def normalise() -> nn.Module:
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # torch divides alpha by 5

    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        *(nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(inplace=True), normalise(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(inplace=True), normalise(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(inplace=True)),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        nn.Flatten(),
        *(nn.Linear(9216, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(4096, classes),
    )


def stock_work(
    pixels: Tensor, labels: Tensor, classes: int, layout: str, precision: torch.dtype, compiled: bool = False
) -> Callable[[], int]:
    """Forward, backward and update on one batch that lies ready, as PyTorch's tutorials write them.

    pixels: [N,3,224,224] fp32. layout: a key of LAYOUTS, of weights and pixels. precision: of autocast;
    torch.float32 is without. Each call does a step and returns N.
    """
    device, memory_format = pixels.device, LAYOUTS[layout]
    pixels = pixels.contiguous(memory_format=memory_format)
    model = stock_alexnet(classes).to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(model) if compiled else model

    def work() -> int:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(forward(pixels), labels)
        loss.backward()
        optimizer.step()
        return len(labels)

    return work
