"""Single samples are fetched by signed range requests from an S3 server, before whole shards are there."""

from itertools import islice

import pytest
import torch

from pipeline import Loader, open_dataset
from pipeline.remote import fetcher
from tests.helpers import assert_same_batches, copies
from tests.remote.faults import KINDS

pytestmark = pytest.mark.slow


def batches(dataset):
    options = {"seed": 7, "device": "cpu", "dtype": torch.float32, "threads": 1}
    with Loader(dataset, 12, 64, **options) as loader:
        return copies(islice(loader.batches(0), 5))


@pytest.mark.parametrize("faulty", [False, True])
def test_the_first_epoch_needs_no_whole_shard(packed, packed_url, proxied, tmp_path, monkeypatch, faulty):
    """No thread fetches shards, so what arrives are samples, and none of their bytes twice."""
    monkeypatch.setattr(fetcher, "CONNECTIONS", 0)
    dataset = open_dataset(packed_url, tmp_path / "cache", "1GB")
    dataset.reader("train")
    if faulty:
        proxied.stall_seconds = 0.1
        proxied.faults.fail_at_random(0, len(KINDS), 0.5, path=r"\.tar$")
    try:
        assert_same_batches(batches(dataset), batches(open_dataset(packed)))
    finally:
        dataset.storage.close()
    counters = dataset.storage.counters
    assert counters.samples_by_range > 0
    if not faulty:
        assert counters.bytes_fetched <= sum(shard.bytes for shard in dataset.manifest.split("train").shards)
        requests = sum(each.requests for name, each in proxied.traffic.items() if name.endswith(".tar"))
        assert requests < 60  # because neighbours come together


def test_samples_of_a_deleted_shard_are_damage(packed_url, bucket, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(fetcher, "CONNECTIONS", 0)
    S3FileSystem().rm(f"{packed_url}/train-000002.tar")
    dataset, damages = open_dataset(packed_url, tmp_path / "cache", "1GB"), []
    try:
        with Loader(dataset, 12, 64, device="cpu", threads=1, on_damage=damages.append) as loader:
            copies(islice(loader.batches(0), 5))
    finally:
        dataset.storage.close()
    assert len({damage.location for damage in damages}) == len(damages) == 20  # a third of 60
    assert all(f"{packed_url}/train-000002.tar at byte" in damage.location for damage in damages)
    assert {damage.what for damage in damages} == {"cannot be read: it is missing"}
