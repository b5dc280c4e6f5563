"""Images in files that can only be read from front to end: Hugging Face's Parquet, and compressed tars."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.manifest import read_manifest
from pipeline.packing import executors, extraction
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from tests.helpers import run
from tests.trees import Tree, assert_refused, class_folders, contents, pack_here, packed_files, tar_of, write
from tools.draw_pictures import class_names, draw

COMPRESSIONS = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}


@pytest.fixture(scope="module")
def tree() -> Tree:
    """Drawn pictures of three classes, 5 to train on and 2 to validate on."""
    tree: Tree = {"train": {}, "val": {}}
    for label, name in enumerate(sorted(class_names()[:3])):
        for split, count in (("train", 5), ("val", 2)):
            for number in range(count):
                buffer = io.BytesIO()
                draw(name, np.random.default_rng((label, number, count))).save(buffer, "JPEG")
                tree[split].setdefault(name, {})[f"{number}.jpg"] = buffer.getvalue()
    return tree


@pytest.fixture(scope="module")
def shards(tree, tmp_path_factory) -> dict[str, bytes]:
    """The shards and indices of the class folders."""
    root = tmp_path_factory.mktemp("folders")
    return shards_in(packed_files(class_folders(tree, root / "in"), root / "out"))


def shards_in(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.endswith((".tar", ".idx", ".npy"))}


def columns(tree: Tree, split: str) -> dict[str, list]:
    """The columns of a split as Hugging Face stores them, with the rows of the classes in turn."""
    names = sorted(tree[split])
    rows = [(name, file, content) for name in names for file, content in tree[split][name].items()]
    rows.sort(key=lambda row: row[1])
    return {
        "image": [{"bytes": content, "path": file} for _, file, content in rows],
        "label": [names.index(name) for name, _, _ in rows],
    }


def write_parquet(
    path: Path, columns: dict[str, list], names: list[str] | None = None, **options: Any
) -> None:
    """Write a Parquet file as Hugging Face's library does; `names` of the classes go into its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, **options)


def hugging_face(tree: Tree, root: Path) -> Path:
    """A folder like that of `ILSVRC/imagenet-1k`, with a test split that has no labels."""
    for split, name in (("train", "train"), ("val", "validation")):
        found = columns(tree, split)
        for number in range(3):
            part = {column: values[number::3] for column, values in found.items()}
            path = root / f"data/{name}-{number:05d}-of-00003.parquet"
            write_parquet(path, part, sorted(tree["train"]), row_group_size=2)
    test = {"image": found["image"], "label": [-1] * len(found["label"])}
    write_parquet(root / "data/test-00000-of-00001.parquet", test, sorted(tree["train"]))
    return root


def test_hugging_faces_parquet_packs_to_the_shards_of_the_class_folders(tree, shards, tmp_path):
    files = packed_files(hugging_face(tree, tmp_path / "in"), tmp_path / "out")
    assert shards_in(files) == shards
    names = sorted(tree["train"])
    assert [(each.id, each.name) for each in read_manifest(tmp_path / "out").classes] == [
        (str(label), name) for label, name in enumerate(names)
    ]
    assert b"test" not in files["report.tsv"]
    assert not (tmp_path / "out/.packing").exists()


def test_a_parquet_file_beside_class_folders_with_images_is_not_the_dataset(tree, tmp_path):
    source = class_folders(tree, tmp_path / "in") / "train"
    write_parquet(source / "metadata.parquet", {"file_name": ["0.jpg"]})
    sources = find_sources(source, 0.2, 0)
    assert sources.classes == sorted(tree["train"])
    assert sources.strays == ["metadata.parquet"]


def test_a_single_parquet_file_is_packed_with_a_fraction_held_out(tree, tmp_path):
    write_parquet(tmp_path / "in.parquet", columns(tree, "train"))
    manifest = pack_here(
        "--input", tmp_path / "in.parquet", "--out", tmp_path / "out", "--val-fraction", "0.2"
    )
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 12, "val": 3}
    assert [each.name for each in manifest.classes] == ["0", "1", "2"]


def test_an_image_that_is_missing_in_a_parquet_file_is_listed(tree, tmp_path):
    found = columns(tree, "train")
    found["image"][4] = {"bytes": None, "path": "lost.jpg"}
    write_parquet(tmp_path / "in.parquet", found)
    pack_here("--input", tmp_path / "in.parquet", "--out", tmp_path / "out", "--val-fraction", "0.2")
    assert f"train/{found['label'][4]}/lost.jpg\trejected\tempty" in (tmp_path / "out/report.tsv").read_text()


IMAGES = [{"bytes": b"x", "path": None}] * 2
REFUSED: dict[str, tuple[dict[str, list], list[str] | None, str]] = {
    "no label": ({"image": IMAGES, "label": [0, None]}, None, "row 2 has no label, but None"),
    "label -1": ({"image": IMAGES, "label": [-1, 0]}, None, "row 1 has no label, but -1"),
    "no name": ({"image": IMAGES, "label": [0, 7]}, ["a", "b"], "row 2 has the label 7, but .* only 2 names"),
    "not a number": ({"image": IMAGES, "label": [0.0, float("nan")]}, None, "row 2 has no label, but nan"),
    "a list": ({"image": IMAGES, "label": [[0], [1]]}, None, r"row 1 has no label, but \[0\]"),
    "no label column": (
        {"image": IMAGES, "digit": [0, 1]},
        None,
        "no column named label; its columns are: image, digit",
    ),
}


@pytest.mark.parametrize(("columns", "names", "message"), REFUSED.values(), ids=REFUSED)
def test_parquet_images_without_usable_labels_are_refused(tmp_path, columns, names, message):
    write_parquet(tmp_path / "in.parquet", columns, names)
    with pytest.raises(SourceError, match=message):
        find_sources(tmp_path / "in.parquet", 0.5, 0)


def test_parquet_files_with_different_classes_are_refused(tree, tmp_path):
    for split, names in (("train", ["a", "b", "c"]), ("val", ["a", "c", "b"])):
        write_parquet(tmp_path / f"{split}.parquet", columns(tree, split), names)
    with pytest.raises(SourceError, match="have different names of classes"):
        find_sources(tmp_path, None, 0)


def test_extraction_holds_a_page_in_memory_and_not_a_row_group(tmp_path):
    image = np.random.default_rng(0).bytes(100_000)
    count = 1000
    write_parquet(
        tmp_path / "in.parquet",
        {"image": [{"bytes": image, "path": None}] * count, "label": [0] * count},
        use_dictionary=False,
        write_batch_size=50,  # rows in a page
    )
    code = (
        "import sys, pyarrow\n"
        "from pipeline.packing.sources.parquet import images_of\n"
        "print(sum(map(len, images_of(sys.argv[1]))), pyarrow.default_memory_pool().max_memory())"
    )
    size, memory = map(int, run("-c", code, str(tmp_path / "in.parquet")).split())
    assert size == count * len(image)
    assert memory < size / 4


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_tars_pack_to_the_shards_of_the_class_folders(tree, shards, tmp_path, ending):
    for split in tree:
        for label, files in enumerate(tree[split].values()):
            members: dict[str, bytes] = {}
            for name, content in files.items():
                key = f"{label}{name.removesuffix('.jpg')}"
                members |= {f"{key}.jpg": content, f"{key}.cls": str(label).encode()}
            write(tmp_path / f"in/{split}-{label}{ending}", COMPRESSIONS[ending](tar_of(members)))
    assert shards_in(packed_files(tmp_path / "in", tmp_path / "out")) == shards


def test_class_tars_are_known_to_be_compressed_by_their_contents(tree, shards, tmp_path):
    for split in tree:
        for name, files in tree[split].items():
            write(tmp_path / f"in/{split}/{name}.tar", gzip.compress(tar_of(files)))
    assert shards_in(packed_files(tmp_path / "in", tmp_path / "out")) == shards


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_compressed_tar_is_named(tree, tmp_path, damage):
    content = bytearray(gzip.compress(tar_of(tree["train"][class_names()[0]])))
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    write(tmp_path / "in/train/a.tar.gz", bytes(content))
    with pytest.raises(SourceError, match=r"a\.tar\.gz is (truncated|damaged)"):
        pack_here("--input", tmp_path / "in/train", "--out", tmp_path / "out", "--val-fraction", "0.2")


def test_a_tar_compressed_by_zstandard_is_refused_with_the_command_that_helps(tmp_path):
    write(tmp_path / "train/0.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(SourceError, match=r"0\.tar\.zst is compressed by Zstandard: .* unzstd"):
        find_sources(tmp_path, None, 0)


def test_compressed_tars_cannot_be_indexed_in_place(tree, tmp_path):
    files = tree["train"][class_names()[0]]
    for split in ("train", "val"):
        write(
            tmp_path / f"{split}.tar.gz",
            gzip.compress(tar_of({"0.jpg": next(iter(files.values())), "0.cls": b"0"})),
        )
    with pytest.raises(SourceError, match=r"--in-place needs plain tars"):
        pack_here("--input", tmp_path, "--in-place")


def test_a_run_that_stops_while_packing_does_not_extract_again(tree, shards, tmp_path, monkeypatch):
    source = hugging_face(tree, tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(executors, "run_tasks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed_files(source, tmp_path / "out")
    assert [name for name in contents(tmp_path / "out/.packing") if name.endswith(".contents")]
    monkeypatch.setattr(extraction, "_copy", lambda *_: pytest.fail("extracted again"))
    assert shards_in(packed_files(source, tmp_path / "out")) == shards


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ("ff", ["a"], "the bytes in column image are of type string, not binary"),
        (b"", [1, None], "the names of classes of column label are not a list of strings"),
        (b"", "ab", "the names of classes of column label are not a list of strings"),
    ],
)
def test_parquet_files_with_other_types_are_refused(tmp_path, content, names, message):
    found = {"image": [{"bytes": content, "path": "1.jpg"}], "label": [0]}
    write_parquet(tmp_path / "train.parquet", found, names)
    assert_refused(tmp_path, message, 0.1)


def test_a_description_of_labels_without_names_is_enough(tmp_path):
    image = {"bytes": b"", "path": "1.jpg"}
    write_parquet(tmp_path / "train.parquet", {"image": [image] * 4, "label": [0, 0, 1, 1]}, [])
    assert find_sources(tmp_path, 0.5, 0).classes == ["0", "1"]
