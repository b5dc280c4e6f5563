"""Processes that share a cache fetch each shard once, and one that is killed leaves nothing wrong."""

import signal
import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from itertools import islice

import pytest
import torch

from pipeline import Loader, open_dataset
from tests.helpers import REPO, assert_same_batches, copies

_RUN = """
    import sys, time, torch
    from itertools import islice
    from pipeline import Loader, open_dataset
    from pipeline.remote import fetcher
    from pipeline.remote.samples import Samples

    url, cache, rank, world, steps = sys.argv[1:]
    fetcher.PART_BYTES = 4000
    Samples.room = 0
    dataset = open_dataset(url, cache, "1GB")
    loader = Loader(dataset, 12, 64, seed=7, device="cpu", dtype=torch.float32, rank=int(rank), world=int(world))
    for pixels, labels in islice(loader.batches(0), int(steps)):
        print(pixels.double().sum().item(), labels.sum().item(), flush=True)
"""


def start(bucket, cache, rank=0, world=1, steps=10) -> subprocess.Popen:
    arguments = map(str, (bucket.url, cache, rank, world, steps))
    command = [sys.executable, "-c", textwrap.dedent(_RUN), *arguments]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)


def shards(bucket) -> dict[str, bytes]:
    return {name: data for name, data in bucket.files.items() if name.startswith("train-") and "tar" in name}


def test_two_processes_fetch_each_shard_once(bucket, tmp_path, many_shards):
    processes = [start(bucket, tmp_path, rank, 2) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert {name: bucket.sent[name] for name in shards(bucket)} == {
        name: len(data) for name, data in shards(bucket).items()
    }
    for rank, output in enumerate(outputs):
        loader = Loader(
            open_dataset(many_shards), 12, 64, seed=7, device="cpu", dtype=torch.float32, rank=rank, world=2
        )
        sums = [
            f"{pixels.double().sum().item()} {labels.sum().item()}"
            for pixels, labels in copies(islice(loader.batches(0), 10))
        ]
        assert output.splitlines() == sums


@pytest.mark.slow
def test_kills_at_any_time_leave_only_complete_shards_and_the_next_run_goes_on(
    bucket, remote, tmp_path, many_shards
):
    def slowly(*_: object) -> bool:
        time.sleep(0.05)
        return False

    bucket.fault = slowly
    for attempt in range(12):
        process = start(bucket, tmp_path / "cache", steps=100)
        before = sum(bucket.requests.values())
        while sum(bucket.requests.values()) < before + 4 + 3 * attempt and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in (tmp_path / "cache").rglob("train-*.tar"):
            if not path.name.startswith("."):
                assert sha256(path.read_bytes()).digest() == sha256(bucket.files[path.name]).digest()
        for path in (tmp_path / "cache").rglob("train-0000*.tar"):
            if attempt % 3 == 2:
                path.unlink()  # as if it had been evicted
                break
    bucket.fault = lambda *_: False
    local, ours = (
        copies(islice(Loader(dataset, 12, 64, seed=7, device="cpu", dtype=torch.float32).batches(0), 10))
        for dataset in (open_dataset(many_shards), remote())
    )
    assert_same_batches(ours, local)
    assert not list((tmp_path / "cache").rglob("*.partial"))
