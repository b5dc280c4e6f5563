"""Features from a trained net's last hidden layer: computed once for each image, cached and searched.

Features are cached in fp16, 8 KB per image (10.5 GB for ImageNet's training set), in memory-mapped files of
up to PART images. The name of their folder covers everything they depend on, so another checkpoint or dataset
gets another folder. An interrupted computation continues with the next part.

The search is exact, by brute force over all images. A library of approximate indexes (Faiss, hnswlib) would
be faster for many queries, but would have to be checked against this search.
"""

import json
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.files import atomic_write
from tools.experiments.finished import Finished
from tools.experiments.kept import reading
from trainer.precision import autocast, prepare
from trainer.run import RunError

PART = 8192  # maximum number of images in a file
MEMORY = 256 << 20  # bytes that a search uses in addition to its queries
Parts = list[np.ndarray]  # the features of a split, each part fp16 [n,4096]


def cached_features(opened: Finished, split: str, out: Path) -> Parts:
    """Return the features of a split in the order of its shards, mapped from files under `out`.

    Missing features are computed on the centre crop. Raises DatasetError for damaged data, RunError if the
    net's activations are not finite in fp16, RecordError for a damaged file under `out`, and OSError.
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
        # A part is the share of one process out of `count`.
        batches = trained.batches(split, 1, replace(world, rank=part, size=count))
        rows = np.concatenate([features(opened, pixels) for pixels, _ in batches])
        with atomic_write(path) as file:
            np.save(file, rows)
        computed += len(rows)
        rate = computed / (time.monotonic() - begun)
        print(f"features of {split}: part {part + 1} of {count}, {rate:,.0f} images/s", flush=True)
    return [_mapped(path) for path in paths]


def _mapped(path: Path) -> np.ndarray:
    with reading(path):
        return np.load(path, mmap_mode="r")


@torch.inference_mode()
def features(opened: Finished, pixels: Tensor) -> np.ndarray:
    """Map pixels [n,3,crop,crop] to the output of fc7 after its ReLU, fp16 [n,4096]. Raises RunError."""
    with autocast(opened.precision, pixels.device):
        found = opened.net.features(prepare(pixels, opened.precision)).half()
    if not found.isfinite().all():
        raise RunError(
            "the net's activations are not finite in fp16: its training diverged, so train it again"
        )
    return found.cpu().numpy()


def identity(opened: Finished) -> str:
    """Return 16 hex digits that identify what features depend on: net, weights, dataset and precision."""
    trained = opened.trained
    settings = trained.settings.identity()
    found = sha256(json.dumps([settings, opened.precision, trained.dataset.manifest.fingerprint]).encode())
    for name, values in trained.model.state_dict().items():
        found.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def take(parts: Parts, numbers: np.ndarray) -> np.ndarray:
    """Return the rows at these sorted indices: fp16 [n,4096]."""
    ends = np.cumsum([len(part) for part in parts])
    own = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
    starts = [0, *ends[:-1].tolist()]
    return np.concatenate([part[n - start] for part, n, start in zip(parts, own, starts, strict=True)])


def nearest(
    queries: np.ndarray, parts: Parts, count: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` rows of `parts` that are nearest to each query in L2, nearest first.

    queries: [q,d]. Returns distances, float64 [q,count], and indices over all parts, int64 [q,count]; at the
    same distance the lower index comes first. |q|² − 2qx + |x|² is computed in fp64, in which products of
    fp16 values are exact. Uses MEMORY bytes, and 8 bytes for each value of the queries.
    """
    rows = max(1, MEMORY // (10 * queries.shape[1] + 40 * len(queries)))  # as fp16 and fp64, and to sort
    points = torch.from_numpy(np.asarray(queries)).to(device, torch.float64)
    best = torch.full((len(points), 0), torch.inf, dtype=torch.float64, device=device)
    numbers = torch.empty((len(points), 0), dtype=torch.int64, device=device)
    first = 0
    for part in parts:
        for start in range(0, len(part), rows):
            chunk = torch.from_numpy(part[start : start + rows].copy()).to(device).double()
            squares = (chunk * chunk).sum(1) - 2 * (points @ chunk.T)
            found = torch.arange(first + start, first + start + len(chunk), device=device)
            squares, order = torch.cat([best, squares], 1).sort(dim=1, stable=True)
            numbers = torch.cat([numbers, found.expand(len(points), -1)], 1).gather(1, order)[:, :count]
            best = squares[:, :count]
        first += len(part)
    squares = best + (points * points).sum(1, keepdim=True)
    return squares.clamp(min=0).sqrt().cpu().numpy(), numbers.cpu().numpy()
