"""Small datasets in the forms that users have, and helpers to pack them."""

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from pipeline.manifest import Manifest
from pipeline.packing import executors
from pipeline.packing.executors import Executor
from pipeline.packing.progress import Progress
from pipeline.packing.shard import pack_shard
from pipeline.packing.sources.find import SourceError, find_sources
from tools.make_shards import pack, parse_arguments

# Real photos, and odd and broken images with a manifest; not part of the repository. Set by .ci/run.
TEST_DATA = Path(os.environ.get("TEST_DATA", "/nowhere"))
ODD = TEST_DATA / "odd-images"

Tree = dict[str, dict[str, dict[str, bytes]]]  # split, class, file, content


def write(path: Path, content: bytes | str) -> None:
    """Write a file, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def touch(root: Path, *paths: str) -> Path:
    """Create empty files, and folders for paths that end with a slash; return the root."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            write(root / path, b"")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files at any depth in a folder, by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Return an image in a file format, with options of Pillow's `save`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, mtime: float = 0) -> bytes:
    """Return a tar archive of these files. form: one of tarfile's formats."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def val_files(tree: Tree) -> dict[str, tuple[str, bytes]]:
    """Return the class and content of the val files by name, sorted; their names are unique."""
    pairs = (
        (name, (wnid, content)) for wnid, files in tree["val"].items() for name, content in files.items()
    )
    return dict(sorted(pairs))


def class_folders(tree: Tree, root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Write ImageNet's own layout: a folder for each split, with a folder for each class in it."""
    for split in splits:
        for wnid, files in tree[split].items():
            for name, content in files.items():
                write(root / split / wnid / name, content)
    return root


def tars(tree: Tree, root: Path) -> Path:
    """Write the tars as downloaded, with numeric labels. Neither the classes nor the files are in order."""
    numbers = {wnid: number for number, wnid in enumerate(reversed(tree["train"]), 1)}
    inside = {f"{wnid}.tar": tar_of(tree["train"][wnid]) for wnid in numbers}
    flat = val_files(tree)
    write(root / "ILSVRC2012_img_train.tar", tar_of(inside))
    write(root / "ILSVRC2012_img_val.tar", tar_of({name: flat[name][1] for name in reversed(flat)}))
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in flat.values())
    write(root / "ILSVRC2012_validation_ground_truth.txt", truth)
    write(root / "map_clsloc.txt", "".join(f"{wnid} {number} words\n" for wnid, number in numbers.items()))
    return root


def upload(root: Path, url: str) -> None:
    """Copy a folder to a URL."""
    fs, path = fsspec.url_to_fs(url)
    for name, content in contents(root).items():
        fs.pipe_file(f"{path}/{name}", content)


def assert_refused(source: Path | str, message: str, val_fraction: float | None = None) -> None:
    """Check that `find_sources` refuses a source in one line that names it. message: a regular expression."""
    with pytest.raises(SourceError, match=message) as refusal:
        find_sources(source, val_fraction, 0)
    assert str(source) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@contextmanager
def threads(count: int) -> Iterator[Executor]:
    """Replace `executors.processes`, which take a second to start, by threads of this process."""
    with ThreadPoolExecutor(count) as pool:
        yield Executor(lambda task: pool.submit(pack_shard, task), lambda: count)


def pack_here(*arguments: object, progress: Progress | None = None) -> Manifest:
    """Pack in a thread of this process, with the arguments of make_shards.py."""
    options = parse_arguments([*map(str, arguments), "--workers", "1"]).packing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "processes", threads)
        return pack(options, progress)


def packed_files(source: Path | str, output: Path) -> dict[str, bytes]:
    """Pack pictures at 32 px, seven per shard; return all files that are written, including report.tsv."""
    sizes = ("--size", "32", "--shard-samples", "7", "--max-reject-ratio", "0.1")
    pack_here("--input", source, "--out", output, *sizes)
    return contents(output)
