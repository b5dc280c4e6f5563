"""Files are complete or absent, even on storage that behaves differently from a local disk."""

import errno
import io
import os
import stat
from pathlib import Path

import pytest

from pipeline.files import atomic_write, held_open, path_in_errors, read_file, sync, sync_folder

# Errors by which storage says that it cannot sync, and errors by which a sync fails.
UNSUPPORTED = ["EINVAL", "EBADF", "EACCES", "EPERM", "EISDIR", "EROFS"]
UNSUPPORTED += ["ENOSYS", "ENOTTY", "ENOTSUP", "EOPNOTSUPP"]
FAILURES = ["EIO", "ENOSPC", "EDQUOT", "ESTALE", "ENOTCONN", "ETIMEDOUT"]


def failing(monkeypatch, function: str, name: str, folders: bool) -> None:
    """Make a function of os fail for folders, or for files."""
    real = getattr(os, function)

    def fail(what, *arguments):
        if stat.S_ISDIR(os.stat(what).st_mode) == folders:  # noqa: PTH116 – or a descriptor
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return real(what, *arguments)

    monkeypatch.setattr(os, function, fail)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize(("function", "folders"), [("fsync", True), ("open", True), ("fsync", False)])
def test_a_file_is_written_to_storage_that_cannot_sync(tmp_path, monkeypatch, function, folders, name):
    failing(monkeypatch, function, name, folders)
    write(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_sync_of_a_folder_names_it(tmp_path, monkeypatch, name):
    failing(monkeypatch, "fsync", name, folders=True)
    with pytest.raises(OSError, match=str(tmp_path)) as error:
        sync_folder(tmp_path)
    assert error.value.errno == getattr(errno, name)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_write_names_the_file_and_leaves_its_old_content(tmp_path, monkeypatch, name):
    write(tmp_path / "a", b"before")
    failing(monkeypatch, "fsync", name, folders=False)
    with pytest.raises(OSError, match=str(tmp_path / "a")) as error:
        write(tmp_path / "a", b"after")
    assert error.value.errno == getattr(errno, name)
    assert (tmp_path / "a").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_first_error_is_raised_even_if_the_partial_file_cannot_be_removed(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ESTALE, "stale")

    failing(monkeypatch, "fsync", "ENOSPC", folders=False)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(tmp_path / "a", b"")


def test_a_file_opened_for_reading_need_not_be_synced(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    failing(monkeypatch, "fsync", "EBADF", folders=False)
    with open(tmp_path / "a", "rb") as file:
        sync(file.fileno(), tmp_path / "a")


def test_an_error_keeps_the_file_name_or_the_words_that_it_has(tmp_path):
    with pytest.raises(OSError, match="other"), path_in_errors(tmp_path / "a"):
        raise OSError(errno.EIO, "bad", "other")
    with pytest.raises(OSError, match=r"^in words$"), path_in_errors(tmp_path / "a"):
        raise OSError("in words")


def test_a_file_is_synced_then_renamed_and_then_its_folder_is_synced(tmp_path, monkeypatch):
    """So a crash between any two steps leaves the old content or all of the new."""
    path, content = tmp_path / "name", b"new" * 1000
    path.write_bytes(b"old")
    calls = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        what = Path(f"/proc/self/fd/{descriptor}").readlink()
        whole = what.is_dir() or what.read_bytes() == content
        calls.append(("sync", what.name, whole, path.read_bytes()))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append(("rename", self.name, target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    with atomic_write(path) as file:
        file.write(content)
    assert calls == [
        ("sync", ".name.partial", True, b"old"),
        ("rename", ".name.partial", "name"),
        ("sync", tmp_path.name, True, content),
    ]


CONTENT = bytes(range(256)) * 10


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, None), (0, 100), (100, None), (100, 100), (2500, 100), (9000, 5), (9000, None), (0, 0)],
)
@pytest.mark.parametrize("most", [1, 37, 1 << 20])
def test_short_reads_of_a_file_are_completed(tmp_path, monkeypatch, offset, size, most):
    (tmp_path / "a").write_bytes(CONTENT)
    real = io.FileIO.read
    monkeypatch.setattr(
        "builtins.open", lambda path, *_, **__: Raw(path, lambda file, count: real(file, min(count, most)))
    )
    assert read_file(tmp_path / "a", offset, size) == CONTENT[offset:][:size]


class Raw(io.FileIO):
    def __init__(self, path, reads):
        super().__init__(path)
        self.reads = reads

    def read(self, count=-1):
        return self.reads(self, count)


@pytest.mark.parametrize("size", [None, 1000])
def test_a_read_that_would_block_is_an_error_and_not_the_end(tmp_path, monkeypatch, size):
    (tmp_path / "a").write_bytes(CONTENT)
    parts = iter([b"some", None])
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Raw(path, lambda *_: next(parts)))
    with pytest.raises(BlockingIOError, match=str(tmp_path / "a")):
        read_file(tmp_path / "a", 0, size)


def test_a_file_that_grows_while_it_is_read_is_read_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(CONTENT)
    monkeypatch.setattr("os.fstat", lambda _: os.stat_result([0] * 10))
    assert read_file(tmp_path / "a") == CONTENT


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_failed_read_names_the_file(tmp_path, monkeypatch, error):
    def fail(*_):
        raise OSError(error, os.strerror(error))

    (tmp_path / "a").write_bytes(CONTENT)
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Raw(path, fail))
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        read_file(tmp_path / "a")


def test_an_error_in_closing_a_lock_does_not_hide_an_earlier_one(tmp_path):
    lock = open(tmp_path / "lock", "w")  # noqa: SIM115
    os.close(lock.fileno())  # so that closing it is an error
    with pytest.raises(ValueError, match="the reason"), held_open(lock):
        raise ValueError("the reason")


def test_a_lock_is_open_within_its_block_and_closed_after_it(tmp_path):
    lock = open(tmp_path / "lock", "w")  # noqa: SIM115
    with held_open(lock):
        assert not lock.closed
    assert lock.closed
