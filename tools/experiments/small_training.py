"""Train a net of cuda-convnet on small images, and test it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.files import atomic_write
from pipeline.manifest import Manifest
from pipeline.reader import ShardReader
from tools.experiments.cuda_convnet import BATCH, FILE, RECIPES, Update
from tools.experiments.four_layers import SIDE, Images, small_images
from tools.experiments.kept import reading

TEST_BATCH = 500
View = tuple[int, int, bool]  # top and left of a crop, and whether it is reflected


class Data(NamedTuple):
    """The training and the validation images, and the mean training image, [3,SIDE,SIDE]."""

    train: Images
    val: Images
    mean: Tensor


class Outcome(NamedTuple):
    """A trained net's results.

    curve: for each epoch, the shares of misclassified training images, while it trained, and of misclassified
    validation images after it. train_error: the share for the trained net. wrong: for each validation image,
    whether the trained net misclassifies it. The last two are from all views, the curve is from one.
    """

    curve: list[tuple[float, float]]
    train_error: float
    wrong: Tensor
    minutes: float

    @property
    def test_error(self) -> float:
        return float(self.wrong.double().mean())


def load(root: Path, manifest: Manifest, device: torch.device) -> Data:
    """Load a dataset's images at SIDE px. Raises DatasetError."""
    train, val = (_images(ShardReader(root, manifest, split), device) for split in ("train", "val"))
    total = sum(part.float().sum(0) for part in train.pixels.split(FILE))
    return Data(train, val, total / len(train))


def _images(reader: ShardReader, device: torch.device) -> Images:
    return Images(small_images(reader, np.arange(len(reader.rows))), reader.rows["label"], device)


def train(data: Data, folder: Path, name: str, seed: int, epochs: int) -> Outcome:
    """Train the net of a recipe and test it.

    The state is saved in `folder` after each epoch, and training resumes from it. As in cuda-convnet, the
    images have the same order in each epoch; it depends on the seed. Raises RecordError for a damaged state,
    and OSError.
    """
    recipe, device = RECIPES[name], data.mean.device
    torch.manual_seed(seed)
    net = recipe.build(data.train.classes, seed).to(device)
    # On one core, the steps of an epoch of layers-18pct take 40 s in this format, 61 s in NCHW, and 55 s or
    # more if torch.compile is used.
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    update = Update(net, recipe.decays)
    path = folder / f"{name.replace(' ', '-')}-{seed}.pt"
    curve: list[tuple[float, float]] = []
    seconds = 0.0
    if path.exists():
        with reading(path):
            kept = torch.load(path, map_location="cpu", weights_only=True)
            curve, seconds = kept["curve"], kept["seconds"]
        net.load_state_dict(kept["net"])
        update.load(kept["velocities"])
        if "wrong" in kept:
            return Outcome(curve, kept["train_error"], kept["wrong"], seconds / 60)
    tests = views(recipe.crop)
    while len(curve) < epochs:
        begun = time.monotonic()
        rates = recipe.rates(len(curve), epochs)
        train_error = _epoch(data, net, update, rates, recipe.crop, (seed, len(curve)))
        test_error = float(misclassified(net, data.val, data.mean, recipe.crop, tests[:1]).double().mean())
        curve.append((train_error, test_error))
        seconds += time.monotonic() - begun
        state = {"curve": curve, "seconds": seconds, "net": net.state_dict(), "velocities": update.velocities}
        if len(curve) == epochs:
            state["wrong"] = misclassified(net, data.val, data.mean, recipe.crop, tests)
            wrong = misclassified(net, data.train, data.mean, recipe.crop, tests)
            state["train_error"] = float(wrong.double().mean())
        with atomic_write(path) as file:
            torch.save(state, file)
        print(
            f"{name}, seed {seed}, epoch {len(curve)} of {epochs}: training error {train_error:.1%}, "
            f"test error {test_error:.1%}, {seconds / len(curve):.0f} s per epoch",
            flush=True,
        )
    return Outcome(curve, state["train_error"], state["wrong"], seconds / 60)


def _epoch(
    data: Data,
    net: nn.Module,
    update: Update,
    rates: tuple[float, float],
    crop: int | None,
    draw: tuple[int, int],
) -> float:
    """Train one epoch; return the share of misclassified images."""
    rng = np.random.default_rng(draw)
    misses = torch.zeros((), dtype=torch.int64, device=data.mean.device)
    for numbers in batches(len(data.train), draw[0]):
        pixels, labels = data.train.pixels[numbers], data.train.labels[numbers]
        if crop:
            pixels = random_crops(pixels, crop, rng)
        logits = net(centred(pixels, data.mean))
        F.cross_entropy(logits, labels).backward()
        update.step(*rates)
        misses += (logits.argmax(1) != labels).sum()
    return float(misses) / len(data.train)


def batches(images: int, seed: int) -> Iterator[Tensor]:
    """Yield the numbers of the images of each batch. The batches do not cross the files of CIFAR-10."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(images))
    for file in order.split(FILE):
        yield from file.split(BATCH)


def centred(pixels: Tensor, mean: Tensor) -> Tensor:
    """Subtract the centre of the mean image from crops, uint8 [n,3,side,side], and return the net's input."""
    border = (mean.shape[-1] - pixels.shape[-1]) // 2
    centre = mean[:, border : mean.shape[1] - border, border : mean.shape[2] - border]
    return pixels.contiguous(memory_format=torch.channels_last).float() - centre


def random_crops(pixels: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """Return a random crop of each image, [n,3,side,side], half of them reflected."""
    windows = pixels.unfold(2, side, 1).unfold(3, side, 1)  # [n,3,tops,lefts,side,side]
    count, _, tops, lefts = windows.shape[:4]
    top, left, flip = (torch.from_numpy(rng.integers(limit, size=count)) for limit in (tops, lefts, 2))
    crops = windows[torch.arange(count), :, top, left]
    return torch.where(flip.bool().to(crops.device)[:, None, None, None], crops.flip(3), crops)


def views(crop: int | None) -> list[View]:
    """Return the views that are averaged in a test: the centre, the corners, and their reflections.

    The first is the centre. Without crops, the whole image is the only view.
    """
    if crop is None:
        return [(0, 0, False)]
    far = SIDE - crop
    places = [(far // 2, far // 2), (0, 0), (0, far), (far, 0), (far, far)]
    return [(top, left, flip) for flip in (False, True) for top, left in places]


@torch.no_grad()
def misclassified(
    net: nn.Module, images: Images, mean: Tensor, crop: int | None, tests: list[View]
) -> Tensor:
    """Return for each image whether the net misclassifies it: bool [n] on the CPU.

    The softmax is averaged over the views.
    """
    side, found = crop or SIDE, []
    for pixels, labels in zip(images.pixels.split(TEST_BATCH), images.labels.split(TEST_BATCH), strict=True):
        total: Tensor | float = 0.0
        for top, left, flip in tests:
            view = pixels[:, :, top : top + side, left : left + side]
            total = total + net(centred(view.flip(3) if flip else view, mean)).softmax(1)
        found.append(total.argmax(1) != labels)  # type: ignore[union-attr]
    return torch.cat(found).cpu()
