"""Files that are whole or not there."""

import os
from pathlib import Path

from pipeline.files import whole_file


def test_a_file_takes_its_name_once_it_is_on_the_disk_and_then_the_name_is_put_there(tmp_path, monkeypatch):
    """A crash between any two of these leaves the old content or all of the new."""
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
    with whole_file(path) as file:
        file.write(content)
    assert calls == [
        ("sync", ".name.partial", True, b"old"),
        ("rename", ".name.partial", "name"),
        ("sync", tmp_path.name, True, content),
    ]
