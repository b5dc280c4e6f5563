"""The four-layer net of Fig. 1, the small images it learns, and its training."""

import math
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline.files import atomic_write
from pipeline.manifest import DatasetError
from pipeline.reader import ShardReader
from tools.experiments.kept import reading

SIDE = 32  # pixels of an image's side, as in CIFAR-10
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
SPAN = 5  # epochs that show how fast a training error falls
DEVIATIONS = 0.0001, 0.01, 0.01, 0.01  # standard deviations of the initial weights, by layer


def four_layers(classes: int, activation: str, seed: int) -> nn.Sequential:
    """Build a net that maps [n,3,32,32] to logits [n,classes].

    The paper does not describe the four layers. These come from the author's CIFAR-10 example of the time
    (cuda-convnet: 32, 32 and 64 kernels of 5×5, pooling 3/2 after each, one fully connected layer), with
    its initial weights but without its response normalisation.
    """
    torch.manual_seed(seed)
    act = ACTIVATIONS[activation]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),  # [n,32,16,16]
        act(),
        nn.Conv2d(32, 32, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, ceil_mode=True),  # [n,32,8,8]
        nn.Conv2d(32, 64, 5, padding=2),
        act(),
        nn.AvgPool2d(3, 2, ceil_mode=True),  # [n,64,4,4]
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, classes),
    )
    layers = (layer for layer in net if isinstance(layer, (nn.Conv2d, nn.Linear)))
    for layer, deviation in zip(layers, DEVIATIONS, strict=True):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # there is one
    return net


def small_images(reader: ShardReader, numbers: np.ndarray) -> np.ndarray:
    """Return the central squares of samples at SIDE px, uint8 [n,3,SIDE,SIDE]. Raises DatasetError."""
    images = np.empty((len(numbers), SIDE, SIDE, 3), np.uint8)
    for index, number in enumerate(numbers.tolist()):
        jpeg = reader.jpeg(number)
        try:
            with Image.open(BytesIO(jpeg)) as image:
                image.draft("RGB", (SIDE, SIDE))  # lets the decoder reduce it, to an eighth at most
                images[index] = _central_square(image.convert("RGB"))
        except (OSError, SyntaxError):
            name = reader.location(number)
            raise DatasetError(f"the sample in {name} cannot be decoded: copy the shard again") from None
    return images.transpose(0, 3, 1, 2)


def _central_square(image: Image.Image) -> np.ndarray:
    left, top = ((side - min(image.size)) / 2 for side in image.size)
    box = (left, top, left + min(image.size), top + min(image.size))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


class Images:
    """Small images on a device. pixels: uint8 [n,3,SIDE,SIDE]; labels: [n], from 0."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, device: torch.device):
        self.pixels = torch.from_numpy(pixels).to(device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.classes = int(labels.max()) + 1
        self.mean = float(pixels.mean())

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[type["Images"], tuple[np.ndarray, np.ndarray, torch.device]]:
        # Torch would pass the tensors to another process in shared memory, of which containers have 64 MB.
        return type(self), (self.pixels.cpu().numpy(), self.labels.cpu().numpy(), self.pixels.device)

    def inputs(self, numbers: Tensor) -> Tensor:
        return self.pixels[numbers].float() - self.mean


@dataclass(frozen=True)
class Trial:
    """One run, without any regularisation: SGD with momentum 0.9 at a constant learning rate."""

    activation: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.activation}-{self.rate:g}-{self.seed}"

    def state(self, folder: Path) -> Path:
        """Return the file that keeps the run's state."""
        return folder / f"{self}.pt"

    def minutes(self, folder: Path) -> float:
        """Return how long the run has trained so far; version 0.1.0 did not count its epochs' time."""
        path = self.state(folder)
        with reading(path):
            return torch.load(path, map_location="cpu", weights_only=True).get("seconds", 0.0) / 60


def train(
    images: Images,
    trial: Trial,
    folder: Path,
    batch: int,
    target: float,
    epochs: int,
    deadline: float = math.inf,
) -> list[float]:
    """Train until the training error is at most `target`; return the error (0 to 1) of each epoch.

    An epoch's error is measured while it trains. There are at most `epochs` errors; the last one is NaN if
    training diverged. A run that cannot reach the target by `deadline`, in epochs, is given up. The state is
    saved in `folder` after each epoch, and training resumes from it. Raises RecordError for a damaged state,
    and OSError.
    """
    device = images.labels.device
    net = four_layers(images.classes, trial.activation, trial.seed).to(device)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), trial.rate, momentum=0.9)
    path = trial.state(folder)
    errors: list[float] = []
    seconds = 0.0
    if path.exists():
        with reading(path):
            kept = torch.load(path, map_location="cpu", weights_only=True)
            errors, seconds = kept["errors"], kept.get("seconds", 0.0)
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
    done = 0
    while done < epochs and not is_over(errors[:done], target, deadline):
        if done == len(errors):
            begun = time.monotonic()
            errors.append(_epoch(images, net, optimizer, batch, (trial.seed, done)))
            seconds += time.monotonic() - begun
            state = {"errors": errors, "seconds": seconds, "net": net.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            with atomic_write(path) as file:
                torch.save(state, file)
        done += 1
    return errors[:done]


def _epoch(
    images: Images,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: int,
    draw: tuple[int, int],
) -> float:
    """Train one epoch; return the share of misclassified images, or NaN if the loss is not finite."""
    order = torch.from_numpy(np.random.default_rng(draw).permutation(len(images))).to(images.labels.device)
    misses = torch.zeros((), dtype=torch.int64, device=order.device)
    for numbers in order.split(batch):
        logits, labels = net(images.inputs(numbers)), images.labels[numbers]
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        misses += (logits.argmax(1) != labels).sum()
    return float(misses) / len(images) if torch.isfinite(loss) else math.nan


def is_over(errors: list[float], target: float, deadline: float = math.inf) -> bool:
    """Say whether the last error is at most the target, or NaN, or too large to reach it by the deadline.

    deadline: in epochs. A curve flattens at a constant learning rate, so one that would miss the deadline
    even if it went on falling as over its last epochs is given up.
    """
    if not errors or not errors[-1] > target:
        return bool(errors)
    remaining = deadline - (len(errors) - 0.5)
    if remaining <= 0:
        return True
    if len(errors) <= SPAN or math.isinf(deadline):
        return False
    fall = (errors[-1 - SPAN] - errors[-1]) / SPAN
    return errors[-1] - fall * remaining > target


def epochs_to(errors: list[float], target: float) -> float:
    """Return the number of epochs until the training error reached the target, or infinity if it did not.

    An epoch's error counts as the error at its middle; between two epochs it is interpolated linearly.
    """
    for number, error in enumerate(errors):
        if error <= target:
            before = errors[number - 1] if number else math.inf
            return number + 0.5 - (target - error) / (before - error)
    return math.inf
