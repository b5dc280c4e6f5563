"""Evaluation: each image once, in order, whatever the ranks; and ten crops of each."""

import gc
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.graph import evaluation_pipeline
from pipeline.loader import Dataset, Decoding, evaluation_loader
from tests.helpers import wait_until

CROP = 64
DECODING = Decoding(crop=CROP)


@pytest.fixture(scope="module")
def dataset(packed: Path) -> Dataset:
    return Dataset(packed)


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> tuple[Tensor, np.ndarray]:
    """Of the 20 images of val in order: central pixels minus the mean, and labels."""
    reader, margin = dataset.reader("val"), (80 - CROP) // 2
    images = [np.asarray(Image.open(BytesIO(reader.jpeg(n).tobytes()))) for n in range(len(reader))]
    centres = np.stack(images)[:, margin:-margin, margin:-margin] - np.array(dataset.manifest.pixels.mean)
    return torch.from_numpy(centres).movedim(-1, 1), reader.rows["label"]


@pytest.mark.parametrize(("world", "batch"), [(1, 20), (1, 7), (2, 4), (3, 6), (3, 100), (23, 2)])
def test_an_evaluation_sees_each_image_once(dataset, validation, world, batch):
    batches = []
    for rank in range(world):
        mine = list(evaluation_loader(dataset, "val", batch, DECODING, rank=rank, world=world))
        assert all(len(labels) == len(pixels) == batch for pixels, labels in mine[:-1])
        batches += mine
    pixels, labels = map(torch.cat, zip(*batches, strict=True))
    np.testing.assert_array_equal(labels, validation[1])
    torch.testing.assert_close(pixels.double(), validation[0], rtol=0, atol=1.001)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part, _ in batches)


def test_ten_crops_are_a_dimension_of_their_own(dataset, validation):
    batches = list(evaluation_loader(dataset, "val", 8, DECODING, crops=10))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(n, 10, 3, CROP, CROP) for n in (8, 8, 4)]
    for pixels, _ in batches:
        flat = pixels.flatten(0, 1)
        assert flat.is_contiguous(memory_format=torch.channels_last)
        assert flat.data_ptr() == pixels.data_ptr()
    centres = torch.cat([pixels[:, 4] for pixels, _ in batches])
    torch.testing.assert_close(centres.double(), validation[0], rtol=0, atol=1.001)


def test_a_kept_evaluation_gives_the_same_by_one_pipeline(dataset, validation, monkeypatch):
    built = []

    def build(*arguments, **options):
        built.append(evaluation_pipeline(*arguments, **options))
        return built[-1]

    monkeypatch.setattr("pipeline.loader.evaluation_pipeline", build)
    loader = evaluation_loader(dataset, "val", 8, DECODING, persistent=True)
    for _ in range(3):
        pixels, labels = map(torch.cat, zip(*loader, strict=True))
        np.testing.assert_array_equal(labels, validation[1])
        torch.testing.assert_close(pixels.double(), validation[0], rtol=0, atol=1.001)
    assert len(built) == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_an_evaluation_that_was_given_up_begins_again(dataset, validation, persistent):
    loader = evaluation_loader(dataset, "val", 3, DECODING, persistent=persistent)
    for taken in (1, 5, 7, 0):
        list(islice(loader, taken))
    pixels, labels = map(torch.cat, zip(*loader, strict=True))
    np.testing.assert_array_equal(labels, validation[1])
    torch.testing.assert_close(pixels.double(), validation[0], rtol=0, atol=1.001)


def test_an_evaluation_leaves_no_threads_behind_for_the_garbage_collector(dataset):
    def evaluate() -> None:
        assert len(list(evaluation_loader(dataset, "val", 8, DECODING))) == 3

    def threads() -> set[str]:
        return {path.name for path in Path("/proc/self/task").iterdir()}

    gc.disable()
    try:
        evaluate()
        before = threads()  # with those that libraries keep for the next evaluation
        evaluate()
        wait_until(lambda: threads() <= before)  # the system lists a thread for a moment after its end
    finally:
        gc.enable()
