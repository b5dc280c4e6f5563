"""One bad file among intact ones, whatever is wrong with it and wherever it is.

The outcome is always the same: the file is listed by name and reason, all others are packed, and the exit
code says so. URLs are in test_urls.py.
"""

import errno
import os
import struct
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from pipeline.manifest import DatasetError
from pipeline.packing import contents, images, shard
from pipeline.packing.images import RejectedError, pack_image
from tests.trees import Tree, class_folders, pack_here, tars
from tools.make_shards import check_rejects

ERRORS = [
    ImportError("a codec is missing"),
    MemoryError(),
    ZeroDivisionError(),
    ValueError("no number"),
    RecursionError(),
    struct.error("too short"),
    SyntaxError("not a PNG"),
    OSError("broken data stream"),
    KeyError(7),
    AssertionError(),
    OverflowError(),
    SystemError(),
    EOFError(),
    TypeError(),
    UnicodeDecodeError("ascii", b"\xff", 0, 1, "ordinal not in range"),
]
STAGES = {
    "open": (Image, "open"),
    "decode": (ImageFile.ImageFile, "load"),
    "convert": (images, "_upright"),
    "resize": (images, "_resize_shorter"),
    "encode": (images, "_encode"),
}


def fail_at(stage: str, error: Exception, patch: pytest.MonkeyPatch, is_bad: Callable[[], bool]) -> None:
    """Let a stage of packing raise an error for the bad file."""
    holder, name = STAGES[stage]
    original = getattr(holder, name)

    def fail_or_continue(*arguments, **options):
        if is_bad():
            raise error
        return original(*arguments, **options)

    patch.setattr(holder, name, fail_or_continue)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_in_a_stage_of_packing_rejects_the_file(stage, error, pictures, monkeypatch):
    fail_at(stage, error, monkeypatch, lambda: True)
    content = next(pictures.glob("train/*/*")).read_bytes()
    with pytest.raises(RejectedError) as rejection:
        pack_image(content, "256", 32, 90)
    if isinstance(error, MemoryError):
        assert str(rejection.value) == "out of memory"
    elif isinstance(error, ImportError):
        assert str(rejection.value).startswith("this build has no ")
    else:
        assert str(rejection.value) in ("corrupt", "not an image")


@pytest.fixture
def tree(pictures) -> Tree:
    """Two classes, with two pictures for training and one for validation in each."""
    folders = {split: sorted((pictures / split).iterdir())[:2] for split in ("train", "val")}
    return {
        split: {
            folder.name: {path.name: path.read_bytes() for path in sorted(folder.iterdir())[:count]}
            for folder in folders[split]
        }
        for split, count in (("train", 2), ("val", 1))
    }


def table(tree: Tree, root: Path) -> Path:
    """Write class folders and a table that lists their files."""
    class_folders(tree, root)
    rows = [
        f"{split}/{label}/{name},{label},{split}"
        for split, classes in tree.items()
        for label, files in classes.items()
        for name in files
    ]
    (root / "table.csv").write_text("\n".join(["path,label,split", *rows]))
    return root / "table.csv"


FORMS = {"folders": class_folders, "tars": tars, "table": table}
UNREADABLE = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.EACCES, errno.ENOENT)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["unreadable", *STAGES])
def test_each_file_may_be_the_bad_one(form, kind, tree, tmp_path, monkeypatch):
    source = FORMS[form](tree, tmp_path / "in")
    names = {
        content: name
        for classes in tree.values()
        for files in classes.values()
        for name, content in files.items()
    }
    # A tar that cannot be opened at all ends the run, because it holds other images, too.
    errors = cycle(ERRORS if kind in STAGES else UNREADABLE[:1] if form == "tars" else UNREADABLE)
    read, pack = contents.read, shard.pack_image
    for number, bad in enumerate(names):
        current, error = [b""], next(errors)

        def read_or_fail(*arguments, bad=bad, error=error):
            content = read(*arguments)
            if kind == "unreadable" and content == bad:
                raise error
            return content

        def pack_one(content, *arguments, current=current):
            current[0] = content
            return pack(content, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(contents, "read", read_or_fail)
            patch.setattr(shard, "pack_image", pack_one)
            if kind in STAGES:
                fail_at(kind, error, patch, lambda bad=bad, current=current: current[0] == bad)
            output = tmp_path / f"out{number}"
            manifest = pack_here("--input", source, "--out", output, "--size", 32)
        (line,) = (output / "report.tsv").read_text().splitlines()[1:]
        name, outcome, reason = line.split("\t")
        assert outcome == "rejected"
        assert (reason == "unreadable") == (kind == "unreadable")
        assert name.endswith(names[bad])
        assert sum(split.samples for split in manifest.splits.values()) == len(names) - 1
        with pytest.raises(DatasetError, match=f"1 of {len(names)} files were rejected"):
            check_rejects(manifest, 0.01)
