"""Processes that share a cache fetch each shard once, and one that is killed leaves nothing wrong."""

import fcntl
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import open_dataset
from tests.bucket import Bucket
from tests.helpers import REPO

_RUN = """
    import sys
    import numpy as np
    from pipeline.dataset import open_dataset
    from pipeline.remote import download, fetcher
    from pipeline.remote.samples import Samples

    url, cache = sys.argv[1:]
    fetcher.PART_BYTES, download.BLOCK_BYTES = 4000, 1000
    Samples.room = 0
    reader = open_dataset(url, cache, "1GB").reader("train")
    for jpeg in reader.jpegs(np.arange(len(reader))):
        print(bytes(jpeg).hex())
"""


def start(bucket: Bucket, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(_RUN), bucket.url, str(cache)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)


def samples(root: Path) -> list[str]:
    reader = open_dataset(root).reader("train")
    return [bytes(jpeg).hex() for jpeg in reader.jpegs(np.arange(len(reader)))]


def slowly(*_: object) -> bool:
    time.sleep(0.02)
    return False


def test_others_can_make_room_while_an_index_is_fetched(bucket, remote, tmp_path):
    seen = []

    def lock_cache(_handler: object, name: str, _part: range) -> bool:
        if name.endswith(".npy"):
            seen.append(name)
            with open(tmp_path / "cache" / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False

    bucket.fault = lock_cache
    remote().reader("val")
    assert "val.index.npy" in seen


@pytest.mark.slow
def test_two_processes_fetch_each_shard_once(bucket, tmp_path, many_shards):
    bucket.fault = slowly
    processes = [start(bucket, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=120)[0].split() == samples(many_shards)
    shards = {name: data for name, data in bucket.files.items() if name.startswith("train-0")}
    sent = {name: bucket.sent[name] for name in shards if name.endswith(".tar")}
    assert sent == {name: len(data) for name, data in shards.items() if name.endswith(".tar")}


@pytest.mark.slow
def test_kills_at_any_time_leave_only_complete_shards_and_the_next_process_goes_on(
    bucket, tmp_path, many_shards
):
    bucket.fault = slowly
    for attempt in range(5):
        before = bucket.requests.total()
        with start(bucket, tmp_path) as process:
            while bucket.requests.total() < before + 2 + 7 * attempt and process.poll() is None:
                time.sleep(0.001)
            process.kill()
        complete = [path for path in tmp_path.rglob("train-*.tar") if not path.name.startswith(".")]
        for path in complete:
            assert path.read_bytes() == bucket.files[path.name]
        if attempt % 2:
            for path in complete[::2]:
                path.unlink()  # as if it had been evicted
    with start(bucket, tmp_path) as process:
        assert process.communicate(timeout=120)[0].split() == samples(many_shards)
    assert not list(tmp_path.rglob("*.partial"))
