"""A machine that needs a small part of each shard fetches single samples, and needs no room for shards."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline import DatasetError, Loader, open_dataset
from tests.helpers import assert_same_batches, copies


@pytest.fixture
def launch(monkeypatch):
    """launch(here): be rank 4 of 12 processes, of which so many, from rank 4 on, are on this machine."""

    def set_ranks(here: int) -> dict[str, int]:
        ranks = {"RANK": 4, "WORLD_SIZE": 12, "LOCAL_WORLD_SIZE": here, "LOCAL_RANK": 0}
        for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}).items():
            monkeypatch.setenv(name, str(value))
        return {"rank": 4, "world": 12}

    return set_ranks


def batches(dataset, **options):
    how = {"seed": 7, "device": "cpu", "dtype": torch.float32, "threads": 1}
    with Loader(dataset, 12, 64, **how, **options) as loader:
        return copies(islice(loader.batches(0), 10))


@pytest.mark.parametrize("here", [1, 2])
@pytest.mark.parametrize("window", [0, 2])
def test_only_samples_are_fetched_even_for_a_global_shuffle(
    bucket, remote, many_shards, launch, window, here
):
    options = {**launch(here), "shuffle_window": window}
    dataset = remote(str(sum(map(len, bucket.files.values())) // 4))
    assert_same_batches(batches(dataset, **options), batches(open_dataset(many_shards), **options))
    assert dataset.storage.counters.shards_fetched == 0
    assert dataset.storage.counters.samples_by_range <= 10 + np.ceil(1024 / 1)


@pytest.mark.parametrize("here", [3, 8])
def test_a_machine_that_needs_more_of_each_shard_must_have_room_for_shards(bucket, remote, launch, here):
    dataset = remote(str(sum(map(len, bucket.files.values())) // 4))
    with pytest.raises(DatasetError, match="all shards, shuffled together, and those for evaluation take"):
        Loader(dataset, 12, 64, **launch(here))


def test_the_shards_for_evaluation_must_fit_in_any_case(remote, launch):
    dataset = remote("10kB")
    dataset.reader("val")
    with pytest.raises(DatasetError, match=r"but the shards for evaluation take .*larger --cache-size$"):
        Loader(dataset, 12, 64, **launch(1))
