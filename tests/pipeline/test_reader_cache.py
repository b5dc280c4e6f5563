"""A split that fits into memory is kept there, with the bytes of the first read that were found sound."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import pipeline.reader
from pipeline.checked import CheckedReader, Damage
from pipeline.loader import Dataset
from pipeline.reader import ShardReader

SAMPLES = np.array([41, 3, 20, 3, 59])


@pytest.fixture
def dataset(packed_copy: Path) -> Dataset:
    return Dataset(packed_copy)


def files(reader: ShardReader, numbers: np.ndarray = SAMPLES) -> list[bytes]:
    return [bytes(jpeg) for jpeg in reader.jpegs(numbers)]


def overwrite(dataset: Dataset) -> None:
    """Overwrite all shards in place with zeros."""
    for path in dataset.root.glob("*.tar"):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))


def test_samples_that_were_read_are_kept_and_the_others_are_read(packed, dataset):
    reader = dataset.reader("train")
    assert files(reader, SAMPLES[:2]) == files(Dataset(packed).reader("train"), SAMPLES[:2])
    overwrite(dataset)
    again = reader.read(SAMPLES)
    assert again.fresh.tolist() == [2, 4]
    assert [bytes(jpeg) for jpeg in again.jpegs[:2]] == files(Dataset(packed).reader("train"), SAMPLES[:2])
    assert not any(again.jpegs[2])


@pytest.mark.parametrize(("processes", "stays"), [(1, True), (2, True), (3, False)])
def test_the_processes_of_a_machine_share_a_quarter_of_its_memory(dataset, monkeypatch, processes, stays):
    size = int(dataset.reader("train").rows["size"].sum())
    monkeypatch.setattr(pipeline.reader, "memory_bytes", lambda: 4 * 2 * size)
    reader = Dataset(dataset.root, processes=processes).reader("train")
    reader.read(SAMPLES)
    assert len(reader.read(SAMPLES).fresh) == (0 if stays else len(SAMPLES))


def test_a_process_without_enough_memory_reads_every_time(dataset, monkeypatch):
    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", refuse)
        reader = dataset.reader("train")
    assert len(reader.read(SAMPLES).fresh) == len(reader.read(SAMPLES).fresh) == len(SAMPLES)


def test_a_sample_that_could_not_be_read_is_read_again(dataset, packed):
    reader, path = dataset.reader("train"), dataset.root / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, 0)
    assert list(reader.read(SAMPLES).failures) == [2]
    shutil.copyfile(packed / path.name, path)
    assert path.stat().st_size == size
    assert reader.read(SAMPLES).fresh.tolist() == [2]
    assert files(reader) == files(Dataset(packed).reader("train"))


def test_damaged_samples_are_not_kept_even_if_they_were_read_unchecked_before(dataset, packed):
    reader = dataset.reader("val")
    overwrite(dataset)
    reader.read(np.arange(5))  # unchecked
    damages: list[Damage] = []
    checked = CheckedReader(reader, damages.append, replace=False)
    assert checked.read(np.arange(10))[0].tolist() == []
    assert len(damages) == 10
    shutil.copyfile(packed / "val-000000.tar", dataset.root / "val-000000.tar")
    later = CheckedReader(reader, damages.append, replace=False)
    assert later.read(np.arange(10))[0].tolist() == list(range(10))
    assert len(damages) == 10
