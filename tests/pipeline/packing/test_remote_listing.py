"""Listing storage that fsspec walks folder by folder leaves no folder out that cannot be listed."""

from typing import ClassVar

import fsspec
import pytest

from pipeline import retry
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.remote import RemoteFolder
from tests.trees import assert_refused

FOLDERS = {
    "in": ["train/", "val/"],
    "in/train": ["a/"],
    "in/val": ["a/"],
    "in/train/a": ["1.jpg", "1.jpg", "more/"],
    "in/train/a/more": [],
    "in/val/a": ["2.jpg"],
}


class Shelf(fsspec.AbstractFileSystem):
    """A file system with FOLDERS, of which those in `broken` fail."""

    protocol = "shelf"
    cachable = False
    broken: ClassVar[dict[str, Exception]] = {}

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path in self.broken:
            raise self.broken[path]
        if path not in FOLDERS:
            raise FileNotFoundError(path)
        kinds = [(name.rstrip("/"), "directory" if name.endswith("/") else "file") for name in FOLDERS[path]]
        return [{"name": f"{path}/{name}", "type": kind, "size": 0} for name, kind in kinds]


@pytest.fixture(autouse=True)
def shelf(monkeypatch) -> type[Shelf]:
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setattr(Shelf, "broken", {})
    return Shelf


def test_each_file_is_listed_once():
    assert RemoteFolder("shelf://in").files("") == ["train/a/1.jpg", "val/a/2.jpg"]


@pytest.mark.parametrize("folder", ["in", "in/train", "in/train/a"])
@pytest.mark.parametrize(
    ("error", "reason"), [(OSError("lost"), "lost"), (TimeoutError("too late"), "timed out")]
)
def test_a_server_that_fails_during_the_listing_is_an_error(shelf, monkeypatch, folder, error, reason):
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    shelf.broken[folder] = error
    assert_refused("shelf://in", f"cannot be read: shelf://{folder}: {reason}")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError("forbidden"), "access denied"),
        (FileNotFoundError("in/train/a"), "it no longer exists"),
    ],
)
def test_a_folder_that_is_forbidden_or_missing_is_named_and_the_others_are_found(shelf, error, reason):
    shelf.broken["in/train/a/more"] = error
    found = find_sources("shelf://in", None, 0)
    assert found.unlisted == {"train/a/more": reason}
    assert [source.path for source in found.splits["train"]] == ["train/a/1.jpg"]
    shelf.broken = {"in/train/a": error}
    assert_refused("shelf://in", rf"no files for the split 'train'.*train/a \({reason}\)")
    shelf.broken = {"in/train": error}
    assert_refused("shelf://in", f"read: shelf://in/train cannot be listed: {reason}")


def test_a_link_that_may_lead_to_a_folder_is_named(shelf, monkeypatch):
    links = [{"name": f"in/val/a/{name}", "type": "link", "size": 0} for name in ("more", "3.jpg")]
    listed = shelf.ls
    monkeypatch.setattr(
        shelf, "ls", lambda fs, path, **how: listed(fs, path) + (links if path == "in/val/a" else [])
    )
    found = find_sources("shelf://in", None, 0)
    assert list(found.unlisted) == ["val/a/more"]
    assert [source.path for source in found.splits["val"]] == ["val/a/2.jpg", "val/a/3.jpg"]


def test_an_input_that_does_not_exist_is_refused():
    assert_refused("shelf://elsewhere", "is not a folder, or it is empty")
