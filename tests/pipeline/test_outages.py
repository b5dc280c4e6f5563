"""Storage that fails: passing errors change nothing; lasting ones are an outage or lose a sample."""

import errno
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from pipeline.checked import Damage
from pipeline.loader import Batch, Dataset, Decoding, train_loader
from pipeline.manifest import DatasetError
from pipeline.plan import Plan
from pipeline.reader import OutageError, ShardReader
from tests.helpers import assert_same_batches, copies

pytestmark = pytest.mark.usefixtures("_larger_than_memory")

OUTAGES = [errno.EAGAIN, errno.ESTALE, errno.ENOTCONN, errno.ENOMEM, errno.EMFILE, errno.ETIMEDOUT]
FOREVER = 10_000  # calls


class Storage:
    """Makes the next reads fail, of all files or of one shard of a split. slept: the pauses in seconds."""

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
    return copies(loader)


@pytest.mark.parametrize("code", [errno.EIO, *OUTAGES])
def test_a_passing_error_loses_no_sample_and_is_reported_once(packed, storage, capfd, code):
    expected = batches(Dataset(packed), pytest.fail)
    dataset = Dataset(packed)
    storage.fail(code, times=3, reader=dataset.reader("train"))
    assert_same_batches(batches(dataset, pytest.fail), expected)
    text = capfd.readouterr().err
    assert text.count("train-000000.tar: " + os.strerror(code)) == text.count("\n") == 1


def test_unreadable_samples_are_left_out_without_waiting_for_each(packed, storage):
    dataset, damages = Dataset(packed), []
    storage.fail(errno.EIO, FOREVER, dataset.reader("train"), shard=1)
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
def test_a_lasting_outage_ends_the_loader_and_loses_no_sample(packed, storage, code):
    dataset = Dataset(packed)
    storage.fail(code, FOREVER, dataset.reader("train"), shard=1)
    line = f"train-000001.tar cannot be read: {os.strerror(code)}. Run the same command again"
    with pytest.raises(OutageError, match=line):
        batches(dataset, pytest.fail)


def test_a_stale_file_is_reopened(packed, storage, monkeypatch):
    reader, dup2 = Dataset(packed).reader("train"), os.dup2

    def reopen(file: int, other: int) -> int:
        storage.failures = 0
        return dup2(file, other)

    monkeypatch.setattr(os, "dup2", reopen)
    whole = bytes(reader.jpeg(0))
    storage.fail(errno.ESTALE, FOREVER, reader)
    assert bytes(reader.jpeg(0)) == whole


def test_a_file_that_has_been_replaced_is_not_reopened(packed_copy, storage):
    reader = Dataset(packed_copy).reader("train")
    whole, shard, other = bytes(reader.jpeg(0)), packed_copy / "train-000000.tar", packed_copy / "other"
    other.write_bytes(bytes(shard.stat().st_size))
    other.rename(shard)
    storage.fail(errno.ESTALE, 3, reader)
    assert bytes(reader.jpeg(0)) == whole


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_opening_waits_for_passing_errors_and_names_the_file_of_lasting_ones(packed, storage, code):
    storage.fail(code, times=2)
    assert len(Dataset(packed).reader("train")) == 60
    storage.fail(code, FOREVER)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        Dataset(packed).reader("train")
    assert error.value.filename == str(packed / "train-000000.tar")


def test_a_key_that_cannot_be_read_is_not_a_damaged_header(packed, storage):
    reader = Dataset(packed).reader("train")
    key = reader.key(0)
    storage.fail(errno.EIO, 2, reader)
    assert reader.key(0) == key
    storage.fail(errno.EIO, FOREVER, reader)
    with pytest.raises(DatasetError, match=r"the tar header before .* cannot be read: Input/output error"):
        reader.key(0)
