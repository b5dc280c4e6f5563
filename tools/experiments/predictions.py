"""The predictions of trained nets for each image of a split, computed once and kept."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.files import atomic_write
from tools.experiments.fc7 import identity
from tools.experiments.finished import Finished
from tools.experiments.record import TOP1, TOP5, Measures
from trainer.evaluate import count_errors, log_probabilities
from trainer.precision import autocast, prepare


def probabilities(opened: Finished, split: str, crops: int, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities [images,classes] in fp32, averaged over crops (section 4.1), and labels [images].

    They are kept under `out` and reused for the same weights, images and crops. Raises DatasetError for
    damaged data, and OSError.
    """
    folder = out / "predictions"
    kept = folder / f"{opened.folder.name}-{identity(opened)}-{split}-{crops}.npz"
    if not kept.exists():
        found, labels = _computed(opened, split, crops)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(kept) as file:
            np.savez(file, probabilities=found, labels=labels)
    with np.load(kept) as arrays:
        return arrays["probabilities"], arrays["labels"]


@torch.inference_mode()
def _computed(opened: Finished, split: str, crops: int) -> tuple[np.ndarray, np.ndarray]:
    found, labels = [], []
    for pixels, truth in opened.trained.batches(split, crops, opened.world):
        with autocast(opened.precision, pixels.device):
            scores = log_probabilities(opened.trained.model, prepare(pixels, opened.precision))
        found.append(scores.exp().cpu().numpy())
        labels.append(truth.cpu().numpy())
    return np.concatenate(found), np.concatenate(labels)


def errors(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the top-1 and top-5 error of scores [images,classes], in percent."""
    wrong = count_errors(torch.from_numpy(scores), torch.from_numpy(labels)).tolist()
    return {measure: 100 * count / len(labels) for measure, count in zip((TOP1, TOP5), wrong, strict=True)}


def transposed(rows: Sequence[dict[str, float]]) -> Measures:
    """Turn rows into a list of values for each measure."""
    return {measure: [row[measure] for row in rows] for measure in rows[0]}
