"""Evaluation sees each image once, in order, on any number of ranks, with one crop or ten."""

import gc
from collections.abc import Iterable
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.checked import CheckedReader
from pipeline.graph import evaluation_pipeline
from pipeline.loader import Batch, Dataset, Decoding, evaluation_loader
from pipeline.stream import Stream
from tests.helpers import wait_until

CROP = 64
DECODING = Decoding(crop=CROP)


@pytest.fixture(scope="module")
def dataset(packed: Path) -> Dataset:
    return Dataset(packed)


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> tuple[Tensor, np.ndarray]:
    """Central pixels minus the mean, and labels, of the 20 validation images in order."""
    reader, margin = dataset.reader("val"), (80 - CROP) // 2
    images = [np.asarray(Image.open(BytesIO(reader.jpeg(n).tobytes()))) for n in range(len(reader))]
    centres = np.stack(images)[:, margin:-margin, margin:-margin] - np.array(dataset.manifest.pixels.mean)
    return torch.from_numpy(centres).movedim(-1, 1), reader.rows["label"]


def assert_evaluated(batches: Iterable[Batch], validation: tuple[Tensor, np.ndarray]) -> None:
    """Check that the batches together are the validation images in order."""
    pixels, labels = map(torch.cat, zip(*batches, strict=True))
    np.testing.assert_array_equal(labels, validation[1])
    torch.testing.assert_close(pixels.double(), validation[0], rtol=0, atol=1.001)


@pytest.mark.parametrize(("world", "batch"), [(1, 20), (1, 7), (2, 4), (3, 6), (3, 100), (23, 2)])
def test_an_evaluation_sees_each_image_once(dataset, validation, world, batch):
    batches = []
    for rank in range(world):
        mine = list(evaluation_loader(dataset, "val", batch, DECODING, rank=rank, world=world))
        assert all(len(labels) == len(pixels) == batch for pixels, labels in mine[:-1])
        batches += mine
    assert_evaluated(batches, validation)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part, _ in batches)


def test_ten_crops_have_their_own_dimension(dataset, validation):
    batches = list(evaluation_loader(dataset, "val", 8, DECODING, crops=10))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(n, 10, 3, CROP, CROP) for n in (8, 8, 4)]
    for pixels, _ in batches:
        flat = pixels.flatten(0, 1)
        assert flat.is_contiguous(memory_format=torch.channels_last)
        assert flat.data_ptr() == pixels.data_ptr()
    centres = torch.cat([pixels[:, 4] for pixels, _ in batches])
    torch.testing.assert_close(centres.double(), validation[0], rtol=0, atol=1.001)


def test_a_kept_loader_repeats_the_evaluation_with_one_pipeline(dataset, validation, monkeypatch):
    built = []

    def build(*arguments, **options):
        built.append(evaluation_pipeline(*arguments, **options))
        return built[-1]

    monkeypatch.setattr("pipeline.loader.evaluation_pipeline", build)
    loader = evaluation_loader(dataset, "val", 8, DECODING, persistent=True)
    for _ in range(3):
        assert_evaluated(loader, validation)
    assert len(built) == 1


@pytest.mark.parametrize("kept", [False, True])
def test_an_abandoned_evaluation_starts_again_from_the_first_image(dataset, validation, kept):
    loader = evaluation_loader(dataset, "val", 3, DECODING, persistent=kept)
    for taken in (1, 5, 7, 0):
        list(islice(loader, taken))
    assert_evaluated(loader, validation)


def test_an_evaluation_ends_its_threads_without_the_garbage_collector(dataset):
    def evaluate() -> None:
        assert len(list(evaluation_loader(dataset, "val", 8, DECODING))) == 3

    def threads() -> set[str]:
        return {path.name for path in Path("/proc/self/task").iterdir()}

    gc.disable()
    try:
        evaluate()
        before = threads()  # including those that libraries keep for the next evaluation
        evaluate()
        wait_until(lambda: threads() <= before)  # the system lists a thread for a moment after its end
    finally:
        gc.enable()


@pytest.mark.parametrize(("batch", "look_ahead"), [(3, 10), (3, 2), (20, 10), (1, 1)])
def test_samples_are_not_declared_read_before_they_are(dataset, monkeypatch, batch, look_ahead):
    """Storage that holds only some shards would drop them."""
    reader, announced = dataset.reader("val"), [0]
    read = CheckedReader.read

    def checked(self: CheckedReader, samples: np.ndarray) -> tuple:
        assert samples.min() >= max(announced)
        return read(self, samples)

    def note(samples: range | None) -> None:
        announced.append(samples.start if samples else 0)

    monkeypatch.setattr(Stream, "look_ahead", look_ahead)
    monkeypatch.setattr(CheckedReader, "read", checked)
    monkeypatch.setattr(reader, "read_in_order", note)
    assert sum(len(labels) for _, labels in evaluation_loader(dataset, "val", batch, DECODING)) == 20
    assert max(announced) > 0 or batch + look_ahead >= 20
