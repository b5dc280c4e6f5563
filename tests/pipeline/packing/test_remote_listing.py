"""Folders behind URLs that cannot be listed are named with the reason, and never taken for empty.

The file system here is one that fsspec lists folder by folder. Each of its folders is made to fail with each
error. A transient error ends the run. After a permanent error of a class folder, all other files are found.
"""

import errno
from typing import ClassVar

import aiohttp
import fsspec
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from pipeline import retry
from pipeline.packing.sources.find import Sources, find_sources
from pipeline.packing.sources.remote import RemoteFolder
from tests.trees import assert_refused

CLASS_FOLDERS = [f"{split}/{name}" for split in ("train", "val") for name in ("cat", "dog")]
FILES = {f"{folder}/{file}" for folder in CLASS_FOLDERS for file in ("1.jpg", "more/2.jpg")}
ENTRIES = {  # of each folder
    "in": ["train/", "val/"],
    "in/train": ["cat/", "dog/"],
    "in/val": ["cat/", "dog/"],
    **{f"in/{folder}": ["1.jpg", "1.jpg", "more/"] for folder in CLASS_FOLDERS},
    **{f"in/{folder}/more": ["2.jpg"] for folder in CLASS_FOLDERS},
}


class FakeFileSystem(fsspec.AbstractFileSystem):
    """A file system with ENTRIES, and perhaps links. errors: raised for these folders."""

    protocol = "fake"
    cachable = False
    errors: ClassVar[dict[str, Exception]] = {}
    links: ClassVar[dict[str, list[str]]] = {}

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in self.errors:
            raise self.errors[path]
        if path not in ENTRIES:
            raise FileNotFoundError(path)
        kinds = [(name.rstrip("/"), "directory" if name.endswith("/") else "file") for name in ENTRIES[path]]
        kinds += [(name, "link") for name in self.links.get(path, [])]
        return [{"name": f"{path}/{name}", "type": kind, "size": 0} for name, kind in kinds]


@pytest.fixture(autouse=True)
def file_system(monkeypatch) -> type[FakeFileSystem]:
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    fsspec.register_implementation("fake", FakeFileSystem, clobber=True)
    monkeypatch.setattr(FakeFileSystem, "errors", {})
    monkeypatch.setattr(FakeFileSystem, "links", {})
    return FakeFileSystem


def files_of(sources: Sources) -> set[str]:
    return {source.path for images in sources.splits.values() for source in images}


def status(code: int) -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo(URL("http://x"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://x"))
    return aiohttp.ClientResponseError(info, (), status=code, message=f"status {code}")


TRANSIENT = [
    (status(500), "HTTP 500"),
    (status(503), "HTTP 503"),
    (TimeoutError("too late"), "timed out"),
    (ConnectionResetError("reset"), "broken off"),
    (aiohttp.ClientPayloadError("cut"), "broken off"),
    (OSError("lost"), "lost"),
    (RuntimeError("odd"), "odd"),
    (RuntimeError(), "RuntimeError"),
]
PERMANENT = [
    (PermissionError("forbidden"), "access denied"),
    (OSError(errno.EACCES, "forbidden"), "access denied"),
    (status(403), "HTTP 403"),
    (status(410), "HTTP 410"),
    (FileNotFoundError("gone"), "it no longer exists"),
]


def test_a_file_that_is_listed_twice_is_found_once():
    assert RemoteFolder("fake://in").files("") == sorted(FILES)


@pytest.mark.parametrize("folder", ENTRIES)
@pytest.mark.parametrize(("error", "reason"), TRANSIENT)
def test_a_transient_error_that_persists_is_an_error_of_the_input(file_system, folder, error, reason):
    file_system.errors = {folder: error}
    assert_refused("fake://in", f"cannot be read: fake://{folder}: {reason}")


@pytest.mark.parametrize("folder", [*CLASS_FOLDERS, *(f"{folder}/more" for folder in CLASS_FOLDERS)])
@pytest.mark.parametrize(("error", "reason"), PERMANENT)
def test_a_class_folder_with_a_permanent_error_is_left_out_and_named(file_system, folder, error, reason):
    file_system.errors = {f"in/{folder}": error}
    found = find_sources("fake://in", None, 0)
    assert found.unlisted == {folder: reason}
    assert found.classes == ["cat", "dog"]
    assert files_of(found) == {file for file in FILES if not file.startswith(f"{folder}/")}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("error", "reason"), PERMANENT)
def test_a_split_with_a_permanent_error_is_refused(file_system, split, error, reason):
    file_system.errors = {f"in/{split}": error}
    assert_refused("fake://in", f"cannot be read: fake://in/{split} cannot be listed: {reason}")
    file_system.errors = {f"in/{split}/{name}": error for name in ("cat", "dog")}
    assert_refused("fake://in", rf"no files for the split '{split}'.*{split}/cat \({reason}\)")


@pytest.mark.parametrize(("error", "reason"), PERMANENT[:-1])
def test_an_input_with_a_permanent_error_is_refused(file_system, error, reason):
    file_system.errors = {"in": error}
    assert_refused("fake://in", f"cannot be read: fake://in: {reason}")


def test_an_input_that_does_not_exist_is_refused():
    assert_refused("fake://elsewhere", "is not a folder, or it is empty")


def test_a_link_that_may_lead_to_a_folder_is_named(file_system):
    file_system.links = {"in/val/cat": ["other", "3.jpg"]}
    found = find_sources("fake://in", None, 0)
    assert list(found.unlisted) == ["val/cat/other"]
    assert files_of(found) == FILES | {"val/cat/3.jpg"}
