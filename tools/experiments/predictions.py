"""The predictions of trained nets for each image of a split, computed once and kept."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.files import atomic_write
from tools.experiments.fc7 import identity
from tools.experiments.finished import Finished
from tools.experiments.kept import reading
from tools.experiments.record import TOP1, TOP5, Wrong
from trainer.evaluate import find_errors, log_probabilities
from trainer.precision import autocast, prepare


def probabilities(opened: Finished, split: str, crops: int, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities [images,classes] in fp32, averaged over crops (section 4.1), and labels [images].

    They are kept under `out` and reused for the same weights, images and crops. Raises DatasetError for
    damaged data, RecordError for a damaged file under `out`, and OSError.
    """
    kept = _path(opened, split, crops, out)
    if not kept.exists():
        parts = zip(*_batches(opened, split, crops), strict=True)
        found, labels = (np.concatenate(part) for part in parts)
        with atomic_write(kept) as file:
            np.savez(file, probabilities=found, labels=labels)
    with reading(kept), np.load(kept) as arrays:
        return arrays["probabilities"], arrays["labels"]


def errors_of(opened: Finished, split: str, crops: int, out: Path) -> np.ndarray:
    """Return which images are top-1 and which are top-5 errors: bool [2,images].

    They are kept under `out`, which takes little space for any number of classes. Raises as `probabilities`.
    """
    kept = _path(opened, split, crops, out).with_suffix(".npy")
    if not kept.exists():
        parts = [errors(scores, labels) for scores, labels in _batches(opened, split, crops)]
        with atomic_write(kept) as file:
            np.save(file, np.concatenate(parts, axis=1))
    with reading(kept):
        return np.load(kept)


def _path(opened: Finished, split: str, crops: int, out: Path) -> Path:
    folder = out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{opened.folder.name}-{identity(opened)}-{split}-{crops}.npz"


@torch.inference_mode()
def _batches(opened: Finished, split: str, crops: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the probabilities [n,classes] and labels [n] of each batch."""
    for pixels, labels in opened.trained.batches(split, crops, opened.world):
        with autocast(opened.precision, pixels.device):
            scores = log_probabilities(opened.trained.model, prepare(pixels, opened.precision))
        yield scores.exp().cpu().numpy(), labels.cpu().numpy()


def errors(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which images are top-1 and which are top-5 errors: bool [2,images]. scores: [images,classes]."""
    return find_errors(torch.from_numpy(scores), torch.from_numpy(labels)).numpy()


def wrong(found: Sequence[np.ndarray]) -> dict[str, Wrong]:
    """Return a row's errors, given those of each seed, bool [2,images]."""
    return {measure: Wrong.of([own[number] for own in found]) for number, measure in enumerate((TOP1, TOP5))}
