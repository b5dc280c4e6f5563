"""The cache stays right after kills, is shared by processes, and evicts what its caller says."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from pathlib import Path
from threading import Thread

import pytest

from pipeline.remote.cache import ANYTHING, Cache, CacheFullError, Room, lock_for_reading, locked
from pipeline.remote.options import CacheOptions, parse_size
from tests.helpers import REPO

BYTES = b"shard" * 20
DIGEST = sha256(BYTES).hexdigest()


@pytest.fixture
def cache(tmp_path):
    return Cache(CacheOptions(tmp_path, 250))


def add(cache: Cache, name: str, room: Room = ANYTHING) -> Path:
    path = cache.folder / name
    partial = cache.begin(path, len(BYTES), room)
    partial.write(BYTES, 0)
    assert partial.publish(DIGEST)
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 200 * 10**9), ("1.5 tb", 15 * 10**11), ("512MiB", 2**29), ("4096", 4096), ("1K", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "10XB", "1e9", "nan"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="such as 200GB"):
        parse_size(text)


def test_a_shard_appears_only_once_it_is_complete(cache):
    partial = cache.begin(cache.folder / "a.tar", len(BYTES))
    partial.write(BYTES[50:], 50)
    assert not partial.publish(DIGEST)
    assert not (cache.folder / "a.tar").exists()
    partial.write(BYTES[:50], 0)
    assert partial.publish(DIGEST)
    assert (cache.folder / "a.tar").read_bytes() == BYTES


def test_a_shard_gets_its_name_while_nobody_adds_up_the_sizes(cache):
    partial = cache.begin(cache.folder / "a.tar", len(BYTES))
    partial.write(BYTES, 0)
    thread = Thread(target=partial.publish, args=(DIGEST,))
    with locked(cache.folder):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not (cache.folder / "a.tar").exists()
    thread.join()
    assert (cache.folder / "a.tar").exists()


def test_a_shard_is_fetched_by_one_at_a_time(cache):
    partial, other = cache.begin(cache.folder / "a.tar", 100), Cache(CacheOptions(cache.folder, 250))
    assert other.begin(cache.folder / "a.tar", 100) is None
    partial.discard()
    assert other.begin(cache.folder / "a.tar", 100) is not None


def test_the_cache_does_not_grow_beyond_its_size(cache):
    paths = [add(cache, "set/a.tar"), add(cache, "set/b.tar")]
    known = frozenset(paths)
    with pytest.raises(CacheFullError, match="--cache-size"):
        cache.begin(cache.folder / "set/c.tar", 100, Room(known))
    add(cache, "set/c.tar", Room(known, [paths[1]]))
    assert paths[0].exists()
    assert not paths[1].exists()


def test_shards_that_are_read_are_not_evicted(cache):
    paths = [add(cache, "a.tar"), add(cache, "b.tar")]
    file = os.open(paths[0], os.O_RDONLY)
    assert lock_for_reading(file)
    add(cache, "c.tar")
    assert paths[0].exists()
    os.close(file)
    assert not paths[1].exists()


def test_other_datasets_give_way_by_their_last_use_and_only_if_they_are_idle_for_long(cache):
    old, new = add(cache, "other/old.tar"), add(cache, "other/new.tar")
    os.utime(old, (0, time.time() - 7200))
    os.utime(new, (0, time.time() - 60))
    add(cache, "set/a.tar", Room(idle_seconds=3600))
    assert (old.exists(), new.exists()) == (False, True)
    with pytest.raises(CacheFullError):
        cache.begin(cache.folder / "set/b.tar", 100, Room(frozenset([cache.folder / "set/a.tar"]), (), 3600))


def test_a_full_disk_evicts_more_and_then_is_one_line(cache, monkeypatch):
    paths, real = [add(cache, "a.tar"), add(cache, "b.tar")], os.posix_fallocate

    def full(file: int, *rest: int) -> None:
        if sum(path.exists() for path in paths):
            raise OSError(28, "No space left on device")
        real(file, *rest)

    cache.size = 10**6
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheFullError, match="free the disk"):
        cache.begin(cache.folder / "c.tar", 100, Room(frozenset(paths)))
    add(cache, "c.tar")
    assert not any(path.exists() for path in paths)


def test_what_a_killed_process_was_fetching_is_deleted(tmp_path):
    code = f"""
        import time
        from pathlib import Path
        from pipeline.remote.cache import Cache, CacheOptions
        cache = Cache(CacheOptions(Path({str(tmp_path)!r}), 250))
        partial = cache.begin(cache.folder / "set/a.tar", 100)
        partial.write(b"half", 0)
        print("ready", flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        cache = Cache(CacheOptions(tmp_path, 250))
        assert cache.begin(tmp_path / "set/a.tar", 100) is None
        assert list((tmp_path / "set").iterdir())
        process.send_signal(signal.SIGKILL)
    Cache(CacheOptions(tmp_path, 250))
    assert not list((tmp_path / "set").iterdir())
    assert add(cache, "set/a.tar").read_bytes() == BYTES


def test_a_shard_that_is_being_evicted_is_not_read(cache):
    path = add(cache, "a.tar")
    reading, evicting = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    fcntl.flock(evicting, fcntl.LOCK_EX)
    assert not lock_for_reading(reading)
    path.unlink()
    os.close(evicting)
    assert not lock_for_reading(reading)
    os.close(reading)
