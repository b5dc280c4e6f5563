"""Checkpoints: written atomically, verified, loaded from the newest good one, with the best one kept."""

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import list_checkpoints, load, write
from trainer.run import RunError

CPU = torch.device("cpu")


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}, "errors": [0.5]}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in list_checkpoints(folder, "step"))


def test_the_newest_checkpoints_are_kept_and_the_last_is_loaded(tmp_path):
    for step in (5, 10, 100):
        size = write(tmp_path, step, state(step), keep=2)
    assert steps(tmp_path) == [10, 100]
    assert size[0] == (tmp_path / "step-000000100.pt").stat().st_size
    loaded, notes = load(tmp_path, CPU)
    assert notes == []
    assert loaded["step"] == 100
    torch.testing.assert_close(loaded["model"]["weight"], torch.full((1000,), 100.0))


def test_a_missing_checkpoint_is_not_an_error(tmp_path):
    assert load(tmp_path / "none", CPU) == (None, [])


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_kept_until_there_is_a_better_one(tmp_path, monkeypatch, links):
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step, state(step), keep=1, best=step in (1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000000003.pt", "step-000000005.pt"]
    assert load(tmp_path, CPU)[0]["step"] == 5
    assert load(tmp_path, CPU, "best")[0]["step"] == 3


@pytest.mark.parametrize("damage", ["cut short", "empty", "one byte flipped", "one byte more", "no archive"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_loaded(tmp_path, damage):
    for step in (1, 2):
        write(tmp_path, step, state(step), keep=2)
    newest = list_checkpoints(tmp_path)[0]
    content = newest.read_bytes()
    offset = content.index(state(2)["model"]["weight"].numpy().tobytes()) + 100
    newest.write_bytes(
        {
            "cut short": content[: len(content) // 2],
            "empty": b"",
            "one byte flipped": content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :],
            "one byte more": content + b"\n",
            "no archive": b"x" * 1000,
        }[damage]
    )
    loaded, notes = load(tmp_path, CPU)
    assert loaded["step"] == 1
    assert len(notes) == 1
    assert f"{newest} is damaged" in notes[0]


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    """This includes headers, padding and the checksum, which the archive's own checksums do not cover."""
    write(tmp_path, 1, {"step": 1, "weight": torch.ones(3)}, keep=1)
    (path,) = list_checkpoints(tmp_path)
    content = path.read_bytes()
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        with pytest.raises(RunError, match="is damaged"):
            load(tmp_path, CPU)
    path.write_bytes(content)
    assert load(tmp_path, CPU)[0]["step"] == 1


def test_having_only_damaged_checkpoints_is_an_error(tmp_path):
    write(tmp_path, 1, state(1), keep=2, best=True)
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000000001.pt is damaged.*best-000000001.pt is damaged.*delete"):
        load(tmp_path, CPU)


def test_a_run_that_went_back_keeps_new_checkpoints_and_deletes_damaged_ones(tmp_path):
    for step in (1, 20, 30):
        write(tmp_path, step, state(step), keep=3)
    for path in list_checkpoints(tmp_path)[:2]:
        path.write_bytes(b"")
    assert load(tmp_path, CPU)[0]["step"] == 1
    write(tmp_path, 2, state(2), keep=2)
    assert steps(tmp_path) == [1, 2]


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    write(tmp_path, 1, {"step": 1, "model": Evil()}, keep=1)
    with pytest.raises(RunError, match="is damaged: Weights only load failed"):
        load(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk with 64 KiB of space."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def assert_nothing_is_saved_or_lost(folder: Path, code: int, big: dict) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match=os.strerror(code)) as failed:
        write(folder, 2, big, keep=1, best=True)
    assert failed.value.errno == code
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load(folder, CPU)[0]["step"] == 1


def test_a_full_disk_loses_no_checkpoint(disk):
    write(disk, 1, state(1), keep=1)
    assert_nothing_is_saved_or_lost(disk, errno.ENOSPC, state(2) | {"more": torch.zeros(20_000)})


def test_a_read_only_folder_loses_no_checkpoint(disk):
    write(disk, 1, state(1), keep=1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_nothing_is_saved_or_lost(disk, errno.EROFS, state(2))


def test_a_limit_on_the_size_of_files_loses_no_checkpoint(tmp_path):
    write(tmp_path, 1, state(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the write fails in the middle of the file
    try:
        assert_nothing_is_saved_or_lost(tmp_path, errno.EFBIG, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_loses_no_checkpoint(tmp_path, monkeypatch, call):
    write(tmp_path, 1, state(1), keep=1)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if call == "write":

        def failing_open(*arguments, **options):
            file = open(*arguments, **options)  # noqa: SIM115
            file.write = fail
            return file

        monkeypatch.setattr("pipeline.files.open", failing_open, raising=False)
    else:
        monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    assert_nothing_is_saved_or_lost(tmp_path, errno.EIO, state(2))


def test_content_that_reads_back_differently_is_noticed(tmp_path, monkeypatch):
    write(tmp_path, 1, state(1), keep=1)

    def forget(descriptor: int, *_: object) -> None:
        with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
            file.seek(1000)
            file.write(b"\xff\x00\xff")

    monkeypatch.setattr(os, "posix_fadvise", forget)
    with pytest.raises(OSError, match="the content that was read back differs"):
        write(tmp_path, 2, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


@pytest.mark.parametrize(
    ("owner", "call", "number", "kept", "newest"),
    [
        (os, "fsync", 1, [1, 2], 2),
        (Path, "replace", 1, [1, 2], 2),
        (Path, "replace", 2, [1, 2], 3),
        (Path, "unlink", 1, [1, 2, 3], 3),
        (Path, "unlink", 2, [1, 2, 3], 3),
    ],
)
def test_a_kill_at_any_point_leaves_whole_checkpoints(tmp_path, owner, call, number, kept, newest):
    for step in (1, 2):
        write(tmp_path, step, state(step), keep=2, best=step == 1)
    process = os.fork()
    if not process:
        done, calls = getattr(owner, call), iter(range(1, 100))

        def killed(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return done(*arguments, **options)

        setattr(owner, call, killed)
        write(tmp_path, 3, state(3), keep=2, best=True)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert steps(tmp_path) == kept
    loaded, notes = load(tmp_path, CPU)
    assert (loaded["step"], notes) == (newest, [])
    # A run that resumes at step 3 does not save it again, so it must already have the best's name.
    assert load(tmp_path, CPU, "best")[0]["step"] == (3 if newest == 3 else 1)
    write(tmp_path, 4, state(4), keep=1, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000000004.pt", "step-000000004.pt"]
