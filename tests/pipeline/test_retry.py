"""Which errors are a file's own and which are tried again, for how long."""

import errno
import os
import time

import pytest

from pipeline.retry import PAUSES, is_outage, with_retries

FILE = [
    "ENOENT",
    "ENOTDIR",
    "EISDIR",
    "EACCES",
    "EPERM",
    "ELOOP",
    "ENAMETOOLONG",
    "EIO",
    "EUCLEAN",
    "EBADMSG",
]
OUTAGES = [
    "ESTALE",
    "ENOTCONN",
    "EMFILE",
    "ENFILE",
    "ENOMEM",
    "ETIMEDOUT",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "EAGAIN",
]
OUTAGES += [
    "EINTR",
    "ENETUNREACH",
    "ENETDOWN",
    "ECONNRESET",
    "ECONNABORTED",
    "ECONNREFUSED",
    "EBUSY",
    "ESHUTDOWN",
]
OUTAGES += ["EREMOTEIO", "ENOLINK", "EPIPE", "EDQUOT", "ENOSPC", "EINVAL", "EBADF"]


def failure(name: str) -> OSError:
    return OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/mnt/file")


class Storage:
    """Fails so many times. said: what people were told. slept: seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError, failures: int):
        self.error, self.failures = error, failures
        self.attempts = 0
        self.said: list[str] = []
        self.slept: list[float] = []
        monkeypatch.setattr(time, "sleep", self.slept.append)

    def read(self) -> bytes:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise self.error
        return b"content"


@pytest.mark.parametrize("name", FILE)
def test_errors_of_a_file(name):
    assert not is_outage(failure(name))


@pytest.mark.parametrize("name", OUTAGES)
def test_errors_of_the_storage_or_the_process(name):
    assert is_outage(failure(name))


def test_errors_of_urls_have_no_number():
    assert not is_outage(FileNotFoundError("s3://bucket/file"))
    assert not is_outage(PermissionError("Access Denied"))
    assert is_outage(OSError("the server went away"))


@pytest.mark.parametrize("name", OUTAGES)
def test_what_passes_is_waited_for_and_said_once(monkeypatch, name):
    storage = Storage(monkeypatch, failure(name), failures=3)
    assert with_retries(storage.read, storage.said.append) == b"content"
    assert storage.slept == list(PAUSES[:3])
    (line,) = storage.said
    assert line.startswith(f"/mnt/file: {os.strerror(getattr(errno, name))}: retrying for")


def test_what_stays_is_raised_after_all_pauses(monkeypatch):
    storage = Storage(monkeypatch, failure("ESTALE"), failures=100)
    with pytest.raises(OSError, match="/mnt/file"):
        with_retries(storage.read, storage.said.append)
    assert storage.slept == list(PAUSES)


def test_an_input_error_is_given_less_time(monkeypatch):
    storage = Storage(monkeypatch, failure("EIO"), failures=100)
    with pytest.raises(OSError, match="/mnt/file"):
        with_retries(storage.read, storage.said.append)
    assert storage.attempts == 3
    assert sum(storage.slept) < 1


@pytest.mark.parametrize(
    "error",
    [failure("ENOENT"), failure("EACCES"), OSError("a library has tried"), FileNotFoundError("s3://a")],
)
def test_what_does_not_pass_is_raised_at_once(monkeypatch, error):
    storage = Storage(monkeypatch, error, failures=100)
    with pytest.raises(type(error)):
        with_retries(storage.read, storage.said.append)
    assert (storage.attempts, storage.slept, storage.said) == (1, [], [])
