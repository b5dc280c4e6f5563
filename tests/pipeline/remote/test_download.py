"""The parts of a shard that are fetched, among blocks that have arrived by themselves."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.remote import download as module
from pipeline.remote.cache import ANYTHING, Cache, RemoteShard
from pipeline.remote.counters import Counters
from pipeline.remote.download import Download
from pipeline.remote.fetcher import Fetcher
from pipeline.remote.options import CacheOptions
from pipeline.remote.priorities import Priorities
from pipeline.remote.requests import Requests


@pytest.fixture
def download(monkeypatch):
    """Of a shard with 9 blocks of 100 bytes and one of 50."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 100)
    return Download(RemoteShard("url", Path("a.tar"), SimpleNamespace(bytes=950)), None)


def parts(download: Download, limit: int, join: int = 0) -> list[range]:
    found = []
    while part := download.next_part(limit, join):
        found.append(part)
    return found


def test_parts_have_the_limit_or_one_block(download):
    assert parts(download, 399) == [range(0, 300), range(300, 600), range(600, 900), range(900, 950)]
    assert download.next_part(399, 0) is None
    download.restart()
    assert parts(download, 10)[-2:] == [range(800, 900), range(900, 950)]


def test_what_has_arrived_is_left_out_unless_it_is_short(download):
    for arrived in (range(0, 100), range(300, 400), range(500, 800)):
        download.arrived(arrived)
    found = parts(download, 1000)
    assert found == [range(100, 300), range(400, 500), range(800, 950)]
    for part in found:
        download.release(part)
    assert parts(download, 1000, join=100) == [range(100, 500), range(800, 950)]


def test_samples_come_in_whole_blocks_that_no_other_thread_fetches(download):
    download.arrived(range(100, 200))
    assert download.part_with(150, 420) == range(200, 500)
    assert download.part_with(320, 600) == range(500, 600)
    assert download.part_with(210, 220) is None
    assert download.part_with(120, 200) is None
    assert download.part_with(901, 949) == range(900, 950)
    assert parts(download, 1000) == [range(0, 100), range(600, 900)]
    assert download.has(120, 200)
    assert not download.has(150, 201)


def test_what_did_not_arrive_is_fetched_by_others(download):
    part = download.part_with(150, 420)
    assert parts(download, 1000) == [range(0, 100), range(500, 950)]
    download.arrived(range(200, 300))
    download.release(part)
    assert [download.next_part(200, 0) for _ in range(2)] == [range(100, 200), range(300, 500)]


def test_a_shard_is_complete_once_all_blocks_have_arrived_in_any_order(download):
    download.arrived(range(500, 950))
    assert not download.is_complete
    download.arrived(range(0, 500))
    assert download.is_complete
    download.distrust(949, 950)
    assert not download.is_complete
    assert parts(download, 1000) == [range(900, 950)]


@pytest.fixture
def fetcher(tmp_path):
    counters = Counters()
    cache, requests = Cache(CacheOptions(tmp_path, 10**6)), Requests(lambda text: None, counters)
    return Fetcher(cache, requests, counters, Priorities())


def shard(name: str, folder: Path) -> RemoteShard:
    return RemoteShard(name, folder / name, SimpleNamespace(bytes=950))


def test_a_shard_that_a_batch_waits_for_comes_first(fetcher, tmp_path):
    first, second = shard("a", tmp_path), shard("b", tmp_path)
    with fetcher.changed:
        for each in (first, second):
            fetcher._begin(each, ANYTHING)
        fetcher.priorities.demanded[second.path] = second
        taken = [fetcher._next_part() for _ in range(2)]
        assert [download.shard.url for download, _ in taken] == ["b", "a"]
        assert fetcher._next_part() is None


def test_nothing_is_begun_once_the_threads_are_to_end(fetcher, tmp_path):
    fetcher.close()
    with fetcher.changed:
        assert fetcher._begin(shard("a", tmp_path), ANYTHING) is None
    assert not list(tmp_path.glob(".*.partial"))
