"""Errors that concern one file are raised; errors of the storage or the process are retried for a while."""

import errno
import os
import pickle
import time
from unittest.mock import Mock

import pytest

from pipeline.retry import PAUSES, StorageError, is_outage, with_retries

OF_A_FILE = ["ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG"]
OF_A_FILE += ["EIO", "EUCLEAN", "EBADMSG"]
OUTAGES = ["ESTALE", "ENOTCONN", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH"]
OUTAGES += ["EAGAIN", "EINTR", "ENETUNREACH", "ENETDOWN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED"]
OUTAGES += ["EBUSY", "ESHUTDOWN", "EREMOTEIO", "ENOLINK", "EPIPE", "EDQUOT", "ENOSPC", "EINVAL", "EBADF"]


def failure(name: str) -> OSError:
    return OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/mnt/file")


class Storage:
    """A file whose first reads fail. said: the reported lines. slept: the pauses in seconds."""

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


@pytest.mark.parametrize("name", OF_A_FILE + OUTAGES)
def test_only_errors_of_the_storage_or_the_process_are_outages(name):
    assert is_outage(failure(name)) == (name in OUTAGES)


def test_errors_of_urls_are_classified_by_their_type():
    assert not is_outage(FileNotFoundError("s3://bucket/file"))
    assert not is_outage(PermissionError("Access Denied"))
    assert is_outage(OSError("the server went away"))


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_is_retried_and_reported_once(monkeypatch, name):
    storage = Storage(monkeypatch, failure(name), failures=3)
    assert with_retries(storage.read, storage.said.append) == b"content"
    assert storage.slept == list(PAUSES[:3])
    (line,) = storage.said
    assert line.startswith(f"/mnt/file: {os.strerror(getattr(errno, name))}: retrying for")


def test_an_outage_that_persists_is_raised_after_all_pauses(monkeypatch):
    storage = Storage(monkeypatch, failure("ESTALE"), failures=100)
    with pytest.raises(OSError, match="/mnt/file"):
        with_retries(storage.read, storage.said.append)
    assert storage.slept == list(PAUSES)


def test_an_input_error_is_retried_for_less_time(monkeypatch):
    storage = Storage(monkeypatch, failure("EIO"), failures=100)
    with pytest.raises(OSError, match="/mnt/file"):
        with_retries(storage.read, storage.said.append)
    assert storage.attempts == 3
    assert sum(storage.slept) < 1


@pytest.mark.parametrize(
    "error",
    [failure("ENOENT"), failure("EACCES"), OSError("a library has tried"), FileNotFoundError("s3://a")],
)
def test_a_permanent_error_is_raised_at_once(monkeypatch, error):
    storage = Storage(monkeypatch, error, failures=100)
    with pytest.raises(type(error)):
        with_retries(storage.read, storage.said.append)
    assert (storage.attempts, storage.slept, storage.said) == (1, [], [])


def remote(**settings) -> StorageError:
    return StorageError("https://host/file: HTTP 503", "HTTP 503", **settings)


@pytest.mark.parametrize(
    ("error", "slept"),
    [
        (remote(retries=4), list(PAUSES)),
        (remote(retries=2), list(PAUSES[:2])),
        (remote(retries=0), []),
        (remote(retries=2, retry_after=1.0), [1.0, 1.0]),  # longer than the pauses, as the server asks
        (remote(retries=4, retry_after=3.0), [3.0, 3.0, 3.0, PAUSES[3]]),
        (remote(retries=1, retry_after=3600.0), [30.0]),
        (remote(retries=1, retry_after=-5.0), [PAUSES[0]]),
    ],
)
def test_an_error_of_a_url_determines_how_often_and_when_it_is_retried(error, slept, monkeypatch):
    pauses, lines = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(StorageError):
        with_retries(Mock(side_effect=error), lines.append)
    assert pauses == slept
    assert [line.partition(": retrying")[0] for line in lines] == [str(error)] * bool(slept)


def test_an_error_of_a_url_keeps_its_meaning_between_processes():
    original = remote(transient=False, retries=3, retry_after=2.0)
    error = pickle.loads(pickle.dumps(original))
    assert (str(error), vars(error)) == (str(original), vars(original))
    assert not is_outage(error)
    assert is_outage(remote())
