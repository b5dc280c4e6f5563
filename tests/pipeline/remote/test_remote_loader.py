"""Loaders of a dataset behind a URL give the batches of a local one."""

from itertools import islice

import pytest
import torch

from pipeline import EvaluationLoader, Loader, open_dataset
from tests.helpers import assert_same_batches, copies


def train_batches(dataset, steps=9, start=0, **options):
    loader = Loader(dataset, 12, 64, seed=7, device="cpu", dtype=torch.float32, **options)
    return copies(islice(loader.batches(start), steps))


@pytest.mark.parametrize("options", [{}, {"shuffle_window": 3}, {"balance": 1.0}, {"rank": 1, "world": 2}])
def test_training_batches_are_those_of_the_local_dataset(many_shards, remote, options):
    expected = train_batches(open_dataset(many_shards), **options)
    assert_same_batches(train_batches(remote(), **options), expected)


def test_a_run_continues_in_mid_epoch_with_the_same_batches(many_shards, remote):
    expected = train_batches(open_dataset(many_shards), start=3)
    assert_same_batches(train_batches(remote(), start=3), expected)


def test_evaluations_give_the_batches_of_the_local_dataset(many_shards, remote):
    def passes(dataset):
        with EvaluationLoader(dataset, 6, 64, device="cpu", dtype=torch.float32) as loader:
            return copies(loader) + copies(loader)

    assert_same_batches(passes(remote()), passes(open_dataset(many_shards)))


@pytest.mark.usefixtures("_whole_shards")
def test_each_shard_is_fetched_once_and_used_again_by_the_next_run(bucket, remote):
    train_batches(remote(), steps=12)
    shards = {name: len(content) for name, content in bucket.files.items() if name.startswith("train-0")}
    fetched = {name: bucket.sent[name] for name in shards if name.endswith(".tar")}
    assert fetched == {name: size for name, size in shards.items() if name.endswith(".tar")}
    bucket.sent.clear()
    train_batches(remote(), steps=12)
    assert set(bucket.sent) == {"dataset.json"}


@pytest.mark.usefixtures("_larger_than_memory", "_whole_shards")
def test_a_cache_for_two_windows_is_enough_however_many_windows_pass_in_a_few_steps(many_shards, remote):
    sizes = [shard.bytes for shard in open_dataset(many_shards).manifest.split("train").shards]
    options: dict = {"shuffle_window": 1, "steps": 20}  # four epochs
    expected = train_batches(open_dataset(many_shards), **options)
    assert_same_batches(train_batches(remote(str(4 * max(sizes))), **options), expected)
