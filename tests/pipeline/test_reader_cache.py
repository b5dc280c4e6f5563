"""A split that fits stays in memory, with the bytes that were read first and found sound."""

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
def dataset(packed: Path, tmp_path: Path) -> Dataset:
    """A copy to damage once it is open."""
    return Dataset(Path(shutil.copytree(packed, tmp_path / "data")))


def files(reader: ShardReader, numbers: np.ndarray = SAMPLES) -> list[bytes]:
    return [bytes(jpeg) for jpeg in reader.jpegs(numbers)]


def overwrite(dataset: Dataset) -> None:
    """All shards, in place."""
    for path in dataset.root.glob("*.tar"):
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))


def test_what_was_read_stays_and_the_rest_is_read(packed, dataset):
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


def test_a_process_that_gets_no_memory_reads_each_time(dataset, monkeypatch):
    def refuse(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", refuse)
        reader = dataset.reader("train")
    assert len(reader.read(SAMPLES).fresh) == len(reader.read(SAMPLES).fresh) == len(SAMPLES)


def test_what_could_not_be_read_is_read_again(dataset, packed):
    reader, path = dataset.reader("train"), dataset.root / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, 0)
    assert list(reader.read(SAMPLES).failures) == [2]
    shutil.copyfile(packed / path.name, path)
    assert path.stat().st_size == size
    assert reader.read(SAMPLES).fresh.tolist() == [2]
    assert files(reader) == files(Dataset(packed).reader("train"))


def test_what_is_damaged_is_not_kept_and_what_another_has_read_is_looked_at(dataset, packed):
    reader = dataset.reader("val")
    overwrite(dataset)
    reader.read(np.arange(5))  # by somebody who does not look
    damages: list[Damage] = []
    checked = CheckedReader(reader, damages.append, replace=False)
    assert checked.read(np.arange(10))[0].tolist() == []
    assert len(damages) == 10
    shutil.copyfile(packed / "val-000000.tar", dataset.root / "val-000000.tar")
    later = CheckedReader(reader, damages.append, replace=False)
    assert later.read(np.arange(10))[0].tolist() == list(range(10))
    assert len(damages) == 10
