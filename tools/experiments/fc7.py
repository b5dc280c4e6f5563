"""What a trained net's last hidden layer says of every image of a split: computed once, kept, and searched.

Features are kept in fp16, 8 KB an image (10.5 GB for ImageNet's training set), in files of up to PART
images that are mapped, not read. Their folder is named by all that they depend on: another checkpoint or
dataset has a folder of its own. A computation that was interrupted goes on with the next part.

The search is brute force, and exact: each image is looked at. A library of approximate indexes (Faiss,
hnswlib) would be faster for many queries, and would have to be checked against this one.
"""

import json
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.files import whole_file
from tools.experiments.finished import Finished
from trainer.precision import autocast, prepare
from trainer.run import RunError

PART = 8192  # images in a file at most
MEMORY = 256 << 20  # bytes that a search takes, besides the queries themselves
Parts = list[np.ndarray]  # the features of a split, fp16 [n,4096] each


def kept_features(opened: Finished, split: str, out: Path) -> Parts:
    """The features of a split in the order of its shards, mapped from files under `out`.

    What is not there yet is computed, on the centre crop. Raises DatasetError for damaged data, RunError
    where the net's activations are not finite in fp16, OSError.
    """
    trained, world = opened.trained, opened.world
    folder = out / "features" / f"{opened.folder.name}-{trained.step}-{identity(opened)}"
    folder.mkdir(parents=True, exist_ok=True)
    images = trained.dataset.manifest.split(split).samples
    count = -(-images // PART)
    begun, computed = time.monotonic(), 0
    paths = [folder / f"{split}-{part:05d}-of-{count:05d}.npy" for part in range(count)]
    for part, path in enumerate(paths):
        if path.exists():
            continue
        # A part is the share of one process of so many.
        batches = trained.batches(split, 1, replace(world, rank=part, size=count))
        rows = np.concatenate([features(opened, pixels) for pixels, _ in batches])
        with whole_file(path) as file:
            np.save(file, rows)
        computed += len(rows)
        rate = computed / (time.monotonic() - begun)
        print(f"features of {split}: part {part + 1} of {count}, {rate:,.0f} images/s", flush=True)
    return [np.load(path, mmap_mode="r") for path in paths]


@torch.inference_mode()
def features(opened: Finished, pixels: Tensor) -> np.ndarray:
    """Pixels [n,3,crop,crop] → what fc7 makes of them, after its ReLU, fp16 [n,4096]. Raises RunError."""
    with autocast(opened.precision, pixels.device):
        found = opened.trained.model.features(prepare(pixels, opened.precision)).half()
    if not found.isfinite().all():
        raise RunError("the net's activations are not finite in fp16: its training diverged, train it again")
    return found.cpu().numpy()


def identity(opened: Finished) -> str:
    """Sixteen hex digits of what features depend on: the net, its weights, the dataset, the precision."""
    trained = opened.trained
    settings = trained.settings.identity()
    found = sha256(json.dumps([settings, opened.precision, trained.dataset.manifest.fingerprint]).encode())
    for name, values in trained.model.state_dict().items():
        found.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def take(parts: Parts, numbers: np.ndarray) -> np.ndarray:
    """The rows of these numbers, which are sorted: fp16 [n,4096]."""
    ends = np.cumsum([len(part) for part in parts])
    own = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    return np.concatenate([part[n - start] for part, n, start in zip(parts, own, starts, strict=True)])


def nearest(
    queries: np.ndarray, parts: Parts, count: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows of `parts` that are nearest to each query in L2, the nearest first.

    queries: [q,d]. Returns distances, float64 [q,count], and numbers over all parts, int64 [q,count]; of
    rows at the same distance, the one with the lower number comes first. |q|² − 2qx + |x|² is computed in
    fp64, in which products of fp16 values are exact. Takes MEMORY at a time, and 8 bytes a value of queries.
    """
    rows = max(1, MEMORY // (10 * queries.shape[1] + 40 * len(queries)))  # as fp16 and fp64, and to sort
    asked = torch.from_numpy(np.asarray(queries)).to(device, torch.float64)
    best = torch.full((len(asked), 0), torch.inf, dtype=torch.float64, device=device)
    numbers = torch.empty((len(asked), 0), dtype=torch.int64, device=device)
    first = 0
    for part in parts:
        for start in range(0, len(part), rows):
            chunk = torch.from_numpy(part[start : start + rows].copy()).to(device).double()
            squares = (chunk * chunk).sum(1) - 2 * (asked @ chunk.T)
            found = torch.arange(first + start, first + start + len(chunk), device=device)
            squares, order = torch.cat([best, squares], 1).sort(dim=1, stable=True)
            numbers = torch.cat([numbers, found.expand(len(asked), -1)], 1).gather(1, order)[:, :count]
            best = squares[:, :count]
        first += len(part)
    squares = best + (asked * asked).sum(1, keepdim=True)
    return squares.clamp(min=0).sqrt().cpu().numpy(), numbers.cpu().numpy()
