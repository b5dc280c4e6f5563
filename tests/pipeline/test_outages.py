"""Storage that stumbles: what passes changes nothing, and what stays is an outage or a lost sample."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checked import Damage
from pipeline.loader import Batch, Dataset, Decoding, train_loader
from pipeline.manifest import DatasetError
from pipeline.plan import Plan
from pipeline.reader import OutageError, ShardReader

pytestmark = pytest.mark.usefixtures("_larger_than_memory")

OUTAGES = [errno.EAGAIN, errno.ESTALE, errno.ENOTCONN, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT]
FOR_EVER = 10_000  # calls


class Storage:
    """Reads of one shard, by its place in the split, that fail: so many, from now on. slept: seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.slept: list[float] = []
        self.failures, self.code, self.shard = 0, 0, 0
        self.reader: ShardReader | None = None
        monkeypatch.setattr(time, "sleep", self.slept.append)
        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, partial(self.read, getattr(os, name)))

    def read(self, real: Callable, file: int, *what: Any) -> Any:
        if self.failures and (self.reader is None or file == self.reader._files[self.shard]):
            self.failures -= 1
            raise OSError(self.code, os.strerror(self.code))
        return real(file, *what)

    def fail(self, code: int, times: int, reader: ShardReader | None = None, shard: int = 0) -> None:
        self.code, self.failures, self.reader, self.shard = code, times, reader, shard


@pytest.fixture
def storage(monkeypatch) -> Storage:
    return Storage(monkeypatch)


def batches(dataset: Dataset, on_damage: Callable[[Damage], None]) -> list[Batch]:
    plan = Plan(seed=7, batch=12, shard_samples=(20, 20, 20))
    loader = train_loader(dataset, plan, range(10), Decoding(crop=64), on_damage=on_damage)
    return [(pixels.clone(), labels.clone()) for pixels, labels in loader]


@pytest.mark.parametrize("code", [errno.EIO, *OUTAGES])
def test_what_passes_leaves_no_sample_out(packed, storage, capfd, code):
    expected = batches(Dataset(packed), pytest.fail)
    dataset = Dataset(packed)
    storage.fail(code, times=3, reader=dataset.reader("train"))
    for (pixels, labels), (right_pixels, right_labels) in zip(
        batches(dataset, pytest.fail), expected, strict=True
    ):
        assert torch.equal(pixels, right_pixels)
        assert torch.equal(labels, right_labels)
    said = capfd.readouterr().err
    assert said.count("train-000000.tar: " + os.strerror(code)) == said.count("\n") == 1


def test_a_sample_that_stays_unreadable_is_left_out_and_its_shard_is_not_waited_for_again(packed, storage):
    dataset, damages = Dataset(packed), []
    storage.fail(errno.EIO, FOR_EVER, dataset.reader("train"), shard=1)
    assert len(batches(dataset, damages.append)) == 10
    assert len(damages) == 20
    assert {damage.what for damage in damages} == {"cannot be read: Input/output error"}
    assert sum(storage.slept) < 1


def test_a_shard_with_a_lost_sample_is_waited_for_in_an_outage(packed, storage):
    reader = Dataset(packed).reader("train")
    storage.fail(errno.EIO, 10, reader)
    assert list(reader.read(np.array([0])).failures) == [0]
    storage.fail(errno.ESTALE, 4, reader)
    assert not reader.read(np.array([1])).failures


@pytest.mark.parametrize("code", OUTAGES)
def test_an_outage_that_stays_ends_the_loader_and_leaves_no_sample_out(packed, storage, code):
    dataset = Dataset(packed)
    storage.fail(code, FOR_EVER, dataset.reader("train"), shard=1)
    line = f"train-000001.tar cannot be read: {os.strerror(code)}. Run the same command again"
    with pytest.raises(OutageError, match=line):
        batches(dataset, pytest.fail)


def test_a_handle_that_went_stale_is_taken_anew(packed, storage, monkeypatch):
    reader, dup2 = Dataset(packed).reader("train"), os.dup2

    def anew(file: int, other: int) -> int:
        storage.failures = 0
        return dup2(file, other)

    monkeypatch.setattr(os, "dup2", anew)
    whole = bytes(reader.jpeg(0))
    storage.fail(errno.ESTALE, FOR_EVER, reader)
    assert bytes(reader.jpeg(0)) == whole


def test_a_handle_of_another_file_is_not_taken(packed, storage, tmp_path):
    root = Path(shutil.copytree(packed, tmp_path / "data"))
    reader = Dataset(root).reader("train")
    whole = bytes(reader.jpeg(0))
    (root / "other").write_bytes(bytes((root / "train-000000.tar").stat().st_size))
    (root / "other").rename(root / "train-000000.tar")
    storage.fail(errno.ESTALE, 3, reader)
    assert bytes(reader.jpeg(0)) == whole


def test_a_head_that_comes_in_parts_is_read_on(packed, monkeypatch):
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    monkeypatch.setattr(os, "preadv", lambda file, rooms, offset: preadv(file, [rooms[0][:1000]], offset))
    assert len(Dataset(packed).reader("train")) == 60


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_opening_waits_for_what_passes_and_names_what_stays(packed, storage, code):
    storage.fail(code, times=2)
    assert len(Dataset(packed).reader("train")) == 60
    storage.fail(code, FOR_EVER)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        Dataset(packed).reader("train")
    assert error.value.filename == str(packed / "train-000000.tar")


def test_a_key_that_cannot_be_read_is_not_a_damaged_header(packed, storage):
    reader = Dataset(packed).reader("train")
    key = reader.key(0)
    storage.fail(errno.EIO, 2, reader)
    assert reader.key(0) == key
    storage.fail(errno.EIO, FOR_EVER, reader)
    with pytest.raises(DatasetError, match=r"the tar header before .* cannot be read: Input/output error"):
        reader.key(0)
