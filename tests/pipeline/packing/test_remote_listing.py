"""Listing storage that fsspec walks folder by folder leaves no folder out that cannot be listed."""

from typing import ClassVar

import fsspec
import pytest

from pipeline.packing.sources.listing import RemoteFolder
from tests.trees import assert_refused

FOLDERS = {
    "in": ["train/", "val/"],
    "in/train": ["a/"],
    "in/val": ["a/"],
    "in/train/a": ["1.jpg", "1.jpg"],
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
@pytest.mark.parametrize("error", [OSError("lost"), PermissionError("forbidden"), TimeoutError("too late")])
def test_a_folder_that_cannot_be_listed_is_an_error(shelf, folder, error):
    shelf.broken[folder] = error
    assert_refused("shelf://in", f"shelf://in cannot be read: {error}")


def test_a_listed_folder_that_is_missing_is_an_error(shelf):
    shelf.broken["in/train/a"] = FileNotFoundError("in/train/a")
    assert_refused("shelf://in", "in/train/a")


def test_an_input_that_does_not_exist_is_refused():
    assert_refused("shelf://elsewhere", "is not a folder, or it is empty")
