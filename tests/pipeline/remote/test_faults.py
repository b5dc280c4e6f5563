"""Storage that fails: what passes is waited for, and what stays wrong is named, and no image is wrong."""

import errno
import json
import os
import random
import socket
import struct
import time
from hashlib import sha256
from itertools import islice

import pytest
import torch

import pipeline.remote.cache
import pipeline.remote.download
import pipeline.remote.fetcher
import pipeline.remote.reader
import pipeline.remote.requests
import pipeline.remote.storage
from pipeline import DatasetError, Loader, OutageError, open_dataset
from pipeline.manifest import HEAD_BYTES, read_manifest
from pipeline.remote.fetcher import Fetcher
from tests.helpers import assert_same_batches, copies


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(pipeline.remote.requests, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(pipeline.remote.requests, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(pipeline.remote.fetcher, "PART_BYTES", 7000)
    monkeypatch.setattr(pipeline.remote.download, "BLOCK_BYTES", 1000)


def batches(dataset, steps=10, **options):
    with Loader(dataset, 12, 64, seed=7, device="cpu", dtype=torch.float32, **options) as loader:
        return copies(islice(loader.batches(0), steps))


def reset(handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def cut(handler, data: bytes) -> None:
    handler.send(data[: len(data) // 2], length=len(data))
    handler.close_connection = True


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("whole", [True, False])
def test_passing_faults_of_all_kinds_change_no_batch(many_shards, bucket, remote, whole, request):
    if whole:
        request.getfixturevalue("_whole_shards")
    draw, faults = random.Random(5), []

    def fault(handler, name, part) -> bool:
        data = bucket.files[name][part.start : part.stop]
        with bucket.lock:
            kind = draw.choice(("", "", "500", "503", "429", "403", "reset", "cut", "flip", "short"))
        if not name.endswith(".tar") or not kind:
            return False
        faults.append(kind)
        if kind.isdecimal():
            handler.refuse(int(kind))
        elif kind == "reset":
            reset(handler)
        elif kind == "cut":
            cut(handler, data)
        else:
            handler.send(flipped(data) if kind == "flip" else data[:-1])
        return True

    bucket.fault = fault
    monkeypatched = request.getfixturevalue("monkeypatch")
    monkeypatched.setattr(pipeline.remote.fetcher, "_FETCHES", 10_000)  # as these faults are far too many
    monkeypatched.setattr("pipeline.remote.samples._FETCHES", 10_000)
    monkeypatched.setattr("pipeline.remote.requests._SHORT_ANSWERS", 10_000)
    dataset = remote()
    assert_same_batches(batches(dataset), batches(open_dataset(many_shards)))
    assert len(set(faults)) == 8
    assert dataset.storage.counters.wait_seconds > 0


@pytest.mark.parametrize("kind", ["cut", "short", "another mean"])
@pytest.mark.parametrize("which", [1, 2])
def test_a_garbled_manifest_is_read_again(bucket, many_shards, kind, which):
    content, count = bucket.files["dataset.json"], 0

    def fault(handler, name, part) -> bool:
        nonlocal count
        count += 1
        if count != which:
            return False
        if kind == "cut":
            cut(handler, content)
        elif kind == "short":
            handler.send(content[: len(content) // 2])
        else:
            start = content.index(b".", content.index(b'"mean"')) + 1  # of the decimals
            handler.send(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
        return True

    bucket.fault = fault
    assert read_manifest(bucket.url) == read_manifest(many_shards)
    assert count > 2


def test_a_manifest_that_stays_garbled_is_named(bucket):
    content, count = bucket.files["dataset.json"], 0

    def fault(handler, name, part) -> bool:
        nonlocal count
        count += 1
        handler.send(content[:-count])
        return True

    bucket.fault = fault
    with pytest.raises(DatasetError, match=rf"^{bucket.url}/dataset.json arrives differently each time"):
        read_manifest(bucket.url)
    bucket.fault = lambda handler, name, part: handler.send(content[:-9]) or True
    with pytest.raises(DatasetError, match=rf"^{bucket.url}/dataset.json is not valid JSON"):
        read_manifest(bucket.url)


@pytest.mark.usefixtures("_whole_shards")
def test_a_corrupt_object_costs_only_the_samples_that_are_corrupt(bucket, remote, many_shards):
    """Its intact samples are fetched by ranges."""
    reader = open_dataset(many_shards).reader("train")
    row = reader.rows[7]
    name = f"train-{row['shard']:06}.tar"
    data = bytearray(bucket.files[name])
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    bucket.files[name] = bytes(data)
    damages = []
    batches(remote(), on_damage=damages.append)
    assert [str(damage) for damage in damages] == [
        f"the sample in {bucket.url}/{name} at byte {row['offset']} cannot be read: "
        "it does not match its checksum"
    ]
    assert damages[0].reason == "unreadable"


def without_checksums(bucket) -> None:
    """Make the dataset one that an earlier version packed."""
    manifest = json.loads(bucket.files["dataset.json"])
    for split in manifest["splits"].values():
        del split["checksums"], split["checksums_sha256"]
    bucket.files["dataset.json"] = json.dumps(manifest).encode()


@pytest.mark.usefixtures("_whole_shards")
@pytest.mark.parametrize("problem", ["corrupt", "missing", "shorter"])
def test_samples_of_a_lost_shard_are_damage(bucket, remote, problem):
    without_checksums(bucket)
    name = "train-000004.tar"
    if problem == "missing":
        del bucket.files[name]
    else:
        content = bucket.files[name]
        bucket.files[name] = flipped(content) if problem == "corrupt" else content[:-600]
    what = {"corrupt": "does not match its checksum", "missing": "is missing", "shorter": "ends too early"}
    damages = []
    batches(remote(), on_damage=damages.append)
    assert len(damages) == 5
    assert all(f"{bucket.url}/{name} at byte" in damage.location for damage in damages)
    assert {damage.what for damage in damages} == {f"cannot be read: the shard {what[problem]}"}
    with pytest.raises(DatasetError, match=name):
        batches(remote())


@pytest.mark.usefixtures("_short_look_ahead")
@pytest.mark.parametrize("by_range", [False, True])
@pytest.mark.parametrize("problem", ["corrupt", "missing", "shorter"])
def test_a_lost_shard_is_looked_for_again_in_each_epoch(
    bucket, remote, many_shards, request, problem, by_range
):
    """Until it is restored, its samples are named once. Then they are used as if nothing had happened."""
    if not by_range:
        request.getfixturevalue("_whole_shards")
        without_checksums(bucket)
    name = "train-000004.tar"
    content = bucket.files[name]
    wrong = {"corrupt": bytes(len(content)), "shorter": content[:600]}
    bucket.files[name] = wrong.get(problem)
    damages = []
    options = {"seed": 7, "device": "cpu", "dtype": torch.float32}
    with Loader(remote(), 12, 64, on_damage=damages.append, **options) as loader:
        batches = iter(loader.batches(0))
        copies(islice(batches, 11))
        before = bucket.requests[name]
        bucket.files[name] = content
        copies(islice(batches, 9))
        restored = copies(islice(batches, 5))
    assert before > 1 or problem == "missing"
    assert len({damage.location for damage in damages}) == len(damages) == 5
    with Loader(open_dataset(many_shards), 12, 64, **options) as loader:
        assert_same_batches(restored, copies(islice(loader.batches(20), 5)))


@pytest.mark.usefixtures("_whole_shards")
def test_an_object_that_is_replaced_in_mid_run_is_never_decoded(bucket, remote, many_shards):
    other = bucket.files["train-000001.tar"]
    bucket.files["train-000000.tar"] = other.ljust(len(bucket.files["train-000000.tar"]), b"\0")
    damages = []
    batches(remote(), on_damage=damages.append)
    assert len(damages) == 5
    assert {damage.what for damage in damages} == {"cannot be read: it does not match its checksum"}


def test_a_lasting_outage_is_said_and_ends_in_one_line(bucket, remote, monkeypatch, capfd):
    monkeypatch.setattr(pipeline.remote.storage, "OUTAGE_SECONDS", 1.5)
    monkeypatch.setattr(pipeline.remote.storage, "_POLL_SECONDS", 0.05)
    dataset = remote()
    dataset.reader("train")
    bucket.fault = lambda handler, name, part: handler.refuse(503) or True
    beats = []
    dataset.storage.on_wait = lambda: beats.append(time.monotonic())
    with pytest.raises(
        OutageError, match=r"cannot be fetched: .*HTTP 503.* Run the same command again"
    ) as error:
        batches(dataset)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err.count("waiting for storage") == 1
    assert len(beats) >= 3


def test_a_passing_outage_is_said_twice(bucket, remote, many_shards, capfd):
    expected, dataset = batches(open_dataset(many_shards)), remote()
    begun: list[float] = []

    def fault(handler, name, part) -> bool:
        if not name.endswith(".tar"):
            return False
        begun.append(time.monotonic())
        if begun[-1] > begun[0] + 2:
            return False
        handler.refuse(503)
        return True

    bucket.fault = fault
    assert_same_batches(batches(dataset), expected)
    error = capfd.readouterr().err
    assert error.count("waiting for storage: ") == 1
    assert error.count("no longer waiting for storage") == 1


@pytest.mark.usefixtures("_whole_shards")
def test_a_full_cache_disk_is_one_line_if_nothing_can_be_evicted(remote, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.remote.storage, "_FULL_SECONDS", 0.5)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DatasetError, match="or free the disk"):
        batches(remote())


@pytest.mark.usefixtures("_whole_shards")
def test_a_shard_that_is_damaged_in_the_cache_is_fetched_again(bucket, remote, tmp_path, many_shards):
    batches(remote())
    (path,) = (tmp_path / "cache").glob("*/train-000003.tar")
    assert path.stat().st_size < HEAD_BYTES
    path.write_bytes(flipped(path.read_bytes()))
    assert_same_batches(batches(remote()), batches(open_dataset(many_shards)))
    assert sha256(path.read_bytes()).digest() == sha256(bucket.files[path.name]).digest()


@pytest.mark.usefixtures("_whole_shards")
def test_a_shard_that_becomes_shorter_in_the_cache_is_fetched_again(bucket, remote, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.reader.memory_bytes", lambda: 0)
    dataset = remote()
    reader = dataset.reader("train")
    first = bytes(reader.jpeg(0))
    (path,) = (tmp_path / "cache").glob("*/train-000000.tar")
    with open(path, "r+b") as file:
        file.truncate(1000)
    assert bytes(reader.jpeg(0)) == first
    assert path.read_bytes() == bucket.files[path.name]


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("_whole_shards")
@pytest.mark.parametrize("before", [False, True], ids=["once known", "before it is known"])
def test_a_shard_that_is_evicted_before_it_is_open_is_fetched_again(remote, many_shards, monkeypatch, before):
    arrived, evicted = Fetcher._arrived, set()

    def arrived_and_evicted(self, path):
        is_first = path not in evicted
        evicted.add(path)
        if before and is_first:
            self.cache.evict(path)  # by another thread, which makes room
        arrived(self, path)
        if not before and is_first:
            path.unlink()  # by another process

    monkeypatch.setattr(Fetcher, "_arrived", arrived_and_evicted)
    assert_same_batches(batches(remote()), batches(open_dataset(many_shards)))
    assert evicted


def test_the_first_step_does_not_wait_for_shards(remote, many_shards, monkeypatch):
    monkeypatch.setattr(pipeline.remote.fetcher, "CONNECTIONS", 0)  # all that arrives are samples
    dataset = remote()
    first = batches(dataset, steps=1)
    assert dataset.storage.counters.samples_by_range >= 12
    assert_same_batches(first, batches(open_dataset(many_shards), steps=1))


def test_the_pause_before_a_retry_stays_finite_however_long_storage_is_away():
    for attempt in (0, 10, 1024, 10**6):
        pause = pipeline.remote.requests.Requests._pause(OSError(), attempt)
        assert 0 < pause <= pipeline.remote.requests._LONGEST_PAUSE


@pytest.mark.usefixtures("_whole_shards")
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.EIO])
def test_a_shard_in_the_cache_that_cannot_be_opened_once_is_opened_or_fetched_again(
    many_shards, remote, monkeypatch, code
):
    expected, failed, real = batches(open_dataset(many_shards)), [], pipeline.remote.reader.open_shard

    def fails_once(path, shard):
        if not failed:
            failed.append(path)
            raise OSError(code, os.strerror(code), str(path))
        return real(path, shard)

    monkeypatch.setattr(pipeline.remote.reader, "open_shard", fails_once)
    monkeypatch.setattr(pipeline.remote.storage, "_POLL_SECONDS", 0.05)
    assert_same_batches(batches(remote()), expected)
    assert failed
