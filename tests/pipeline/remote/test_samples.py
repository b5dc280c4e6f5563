"""Samples that are near each other come by one request, and each is checked on its own."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pipeline.remote.requests
from pipeline import Loader, open_dataset
from pipeline.plan import Plan
from pipeline.remote import download, fetcher
from pipeline.remote import samples as module
from pipeline.remote.cache import Cache
from pipeline.remote.counters import Counters
from pipeline.remote.fetcher import Fetcher
from pipeline.remote.options import CacheOptions
from pipeline.remote.priorities import Priorities
from pipeline.remote.requests import Requests
from pipeline.remote.samples import Range, Samples, _neighbours
from pipeline.retry import StorageError
from pipeline.shards import checksum
from pipeline.storage import file_system, read_once
from tests.helpers import assert_same_batches, copies, wait_until

CONTENT = np.random.default_rng(0).bytes(5000)
NAME = "samples.tar"


def part(offset: int, size: int, url: str = "") -> Range:
    return Range(url, offset, size, checksum(CONTENT[offset : offset + size]))


@pytest.fixture
def samples(bucket, tmp_path):
    """Samples of a bucket that has CONTENT under NAME, and whose requests are counted from here."""
    bucket.files[NAME] = CONTENT
    bucket.requests.clear()
    counters = Counters()
    requests, cache = Requests(lambda text: None, counters), Cache(CacheOptions(tmp_path / "cache", 10**6))
    samples = Samples(Fetcher(cache, requests, counters, Priorities()))
    yield samples
    samples.requests.closed.set()


def fetch(samples: Samples, parts: list[Range]) -> list[bytes | str]:
    with samples.changed:
        samples.request(parts)
        assert samples.changed.wait_for(lambda: all(each in samples.found for each in parts), timeout=10)
        return [samples.take(each) for each in parts]


def test_neighbours_are_grouped_up_to_a_gap_and_a_size(monkeypatch):
    monkeypatch.setattr(module, "_GAP_BYTES", 100)
    monkeypatch.setattr(module, "_REQUEST_BYTES", 1000)
    near = [part(0, 300), part(400, 100)]
    far, full, elsewhere = part(601, 300), [part(1001, 399), part(1400, 202)], part(500, 10, "other")
    assert list(_neighbours([full[1], near[1], far, elsewhere, full[0], near[0]])) == [
        near,
        [far, full[0]],
        [full[1]],
        [elsewhere],
    ]
    assert list(_neighbours([])) == []


def test_neighbours_come_by_one_request_and_are_those_that_were_asked_for(bucket, samples):
    parts = [part(start, 300, f"{bucket.url}/{NAME}") for start in (3000, 100, 1000)]
    assert fetch(samples, parts) == [CONTENT[each.offset : each.end] for each in parts]
    assert bucket.requests == {NAME: 1}
    assert (samples.counters.samples_by_range, samples.counters.bytes_fetched) == (3, 3200)


def test_only_those_that_do_not_match_are_fetched_again(bucket, samples):
    """Each repeated request counts as one."""
    parts = [part(start, 300, f"{bucket.url}/{NAME}") for start in (100, 1000, 3000)]
    wrong, asked = CONTENT[:1100] + b"?" + CONTENT[1101:], []

    def fault(handler, name, requested) -> bool:
        asked.append(requested)
        if len(asked) < 3:
            handler.send(wrong[requested.start : requested.stop])
        return len(asked) < 3

    bucket.fault = fault
    assert fetch(samples, parts) == [CONTENT[each.offset : each.end] for each in parts]
    assert asked == [range(100, 3300), range(1000, 1300), range(1000, 1300)]
    assert samples.counters.retries == 2
    assert samples.counters.samples_by_range == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["is missing", "is missing"]),
        (CONTENT[:1000], [CONTENT[100:400], "ends too early"]),
        (CONTENT[:1000] + bytes(4000), [CONTENT[100:400], "does not match its checksum"]),
    ],
)
def test_the_loss_of_a_sample_is_not_that_of_its_neighbours(bucket, samples, monkeypatch, content, expected):
    monkeypatch.setattr(pipeline.remote.requests, "_FIRST_PAUSE", 0.001)
    parts = [part(100, 300, f"{bucket.url}/{NAME}"), part(900, 300, f"{bucket.url}/{NAME}")]
    if content is None:
        del bucket.files[NAME]
    else:
        bucket.files[NAME] = content
    assert fetch(samples, parts) == expected


@pytest.fixture
def only_samples(monkeypatch):
    """No thread fetches shards, and blocks are smaller than samples."""
    monkeypatch.setattr(fetcher, "CONNECTIONS", 0)
    monkeypatch.setattr(download, "BLOCK_BYTES", 512)
    monkeypatch.setattr(module, "_GAP_BYTES", 0)


def epoch(dataset) -> list[tuple[torch.Tensor, ...]]:
    with Loader(dataset, 12, 64, seed=7, device="cpu", dtype=torch.float32) as loader:
        return copies(islice(loader.batches(0), 5))


@pytest.mark.usefixtures("only_samples")
def test_what_came_with_samples_is_not_fetched_again(bucket, remote, many_shards):
    dataset = remote()
    rows = dataset.reader("train").rows[["shard", "offset", "size"]].tolist()
    bucket.sent.clear()
    assert_same_batches(epoch(dataset), epoch(open_dataset(many_shards)))
    needed = {
        (shard, block)
        for shard, offset, size in rows
        for block in range(offset // 512, (offset + size - 1) // 512 + 1)
    }
    assert sum(sent for name, sent in bucket.sent.items() if name.endswith(".tar")) == 512 * len(needed)


@pytest.mark.usefixtures("only_samples")
def test_only_samples_of_the_next_two_windows_come_before_their_shards(bucket, remote):
    reader = remote().reader("train")
    plan = Plan(seed=3, batch=10, shard_samples=(5,) * 12, window=2)
    reader.follow(plan, 0, 0, 1)
    reader.prefetch(np.arange(60))
    first = {number // 5 for step in range(2) for number in plan.step_samples(step, 0, 1).tolist()}
    names = {f"train-{shard:06}.tar" for shard in first}
    wait_until(lambda: {name for name in bucket.requests if name.endswith(".tar")} == names)
    assert len(names) == 4


@pytest.mark.usefixtures("only_samples")
def test_a_sample_that_arrives_damaged_is_not_kept(bucket, remote, many_shards):
    dataset, faulty = remote(), []

    def fault(handler, name, part) -> bool:
        if not name.startswith("train-000004") or faulty:
            return False
        faulty.append(part)
        data = bytearray(bucket.files[name][part.start : part.stop])
        data[len(data) // 2] ^= 1
        handler.send(bytes(data))
        return True

    bucket.fault = fault
    assert_same_batches(epoch(dataset), epoch(open_dataset(many_shards)))
    assert faulty
    assert dataset.storage.counters.retries == 1


def test_an_evaluation_asks_for_consecutive_samples_together(bucket, remote, many_shards):
    bucket.requests.clear()
    reader = remote().reader("val")
    numbers = np.arange(len(reader))
    reader.prefetch(numbers)
    local = open_dataset(many_shards).reader("val")
    assert [bytes(jpeg) for jpeg in reader.jpegs(numbers)] == [bytes(jpeg) for jpeg in local.jpegs(numbers)]
    tars = [count for name, count in bucket.requests.items() if name.endswith(".tar")]
    assert sum(tars) <= 2 * len(reader.shards)  # of each shard, its samples, and perhaps the whole shard


def test_a_connection_that_is_closed_because_the_process_ends_is_no_answer(monkeypatch):
    """The file system of s3fs then returns None."""
    closed = SimpleNamespace(cat_file=lambda *_, **__: None)
    monkeypatch.setattr("pipeline.storage.file_system", lambda *_: (closed, "x"))
    with pytest.raises(StorageError, match="broken off"):
        read_once("s3://bucket/x", 0, 10)


def test_samples_do_not_wait_for_the_connections_of_shards():
    fs, _ = file_system("s3://bucket/shards")
    assert fs.config_kwargs["max_pool_connections"] >= fetcher.CONNECTIONS + module.CONNECTIONS
