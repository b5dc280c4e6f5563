"""WebDataset's tars as an input give each image its split, its label and its offset."""

from collections.abc import Iterable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.manifest import read_manifest
from pipeline.packing import storage
from pipeline.packing.sources.archives import ReadAhead, members
from pipeline.packing.sources.find import SourceImage, Sources, find_sources
from tests.trees import Tree, assert_refused, class_folders, encode, packed_files, tar_of, upload, write
from tools.draw_pictures import class_names, draw

LABELS = 12  # as text, 10 and 11 would come before 2
NAMES = {  # of the tars for training and for validation
    "as at Hugging Face": ("imagenet1k-train-%04d.tar", "imagenet1k-validation-%02d.tar"),
    "as in WebDataset's examples": ("train-%06d.tar", "val-%06d.tar"),
    "a folder for each split": ("train/%05d.tar", "val/%05d.tar"),
    "deeper folders with other names": ("data/v2/Training/%d.tar", "data/v2/set_valid/%d.tar"),
}
every_naming = pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)


@pytest.fixture(scope="module")
def tree() -> Tree:
    """Drawn pictures of twelve classes, which are numbers; 3 for training and 1 for validation in each."""
    found: Tree = {"train": {}, "val": {}}
    for split, count in (("train", 3), ("val", 1)):
        for label in range(LABELS):
            for number in range(count):
                image = draw(class_names()[label % 10], np.random.default_rng((label, number, count)))
                found[split].setdefault(str(label), {})[f"{number}-{label}.jpg"] = encode(image)
    return found


def samples(tree: Tree, split: str) -> Iterable[dict]:
    """Yield the first images of all classes, then the second ones, as in a shuffled dataset."""
    every = [(name, label, image) for label, files in tree[split].items() for name, image in files.items()]
    for name, label, image in sorted(every):
        yield {"__key__": name[:-4], "jpg": image, "cls": int(label), "json": {"width": 144}}


def shards(tree: Tree, root: Path, names: tuple[str, str]) -> Path:
    """Write tars of seven samples with WebDataset's writer."""
    for split, name in zip(("train", "val"), names, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with webdataset.ShardWriter(str(root / name), maxcount=7, verbose=0) as writer:
            for sample in samples(tree, split):
                writer.write(sample)
    return root


def images(sources: Sources, split: str) -> list[tuple[int, bytes]]:
    """Return label and bytes of all images, read at the offsets of their sources."""
    return sorted((s.label, storage.read(s.file, s.offset, s.size)) for s in sources.splits[split])


def expected(tree: Tree, split: str) -> list[tuple[int, bytes]]:
    return sorted((int(label), image) for label, files in tree[split].items() for image in files.values())


@every_naming
def test_each_image_is_at_the_offset_of_its_source_with_the_label_of_its_cls(tree, tmp_path, names):
    sources = find_sources(shards(tree, tmp_path, names), None, 0)
    assert sources.classes == [str(label) for label in range(LABELS)]
    assert sources.strays == []
    for split, tars in (("train", 6), ("val", 2)):
        assert images(sources, split) == expected(tree, split)
        assert len({source.file for source in sources.splits[split]}) == tars


def test_an_image_is_named_by_its_tar_and_member(tree, tmp_path):
    first = find_sources(shards(tree, tmp_path, ("train/%d.tar", "val/%d.tar")), None, 0).splits["train"][0]
    assert (first.path, first.label) == ("train/0.tar/0-0.jpg", 0)
    assert first.file == str(tmp_path / "train/0.tar")


@pytest.fixture(scope="module")
def folders(tree, tmp_path_factory) -> dict[str, bytes]:
    """The files packed from the class folders."""
    root = tmp_path_factory.mktemp("folders")
    return packed_files(class_folders(tree, root / "in"), root / "out")


@every_naming
def test_packing_gives_the_bytes_of_packing_class_folders(tree, folders, tmp_path, names):
    tars = packed_files(shards(tree, tmp_path / "tars", names), tmp_path / "b")
    assert len([name for name in folders if name.endswith(".tar")]) == 6 + 2
    assert [name for name in folders.keys() | tars.keys() if folders.get(name) != tars.get(name)] == []


def test_class_names_can_be_given_to_numeric_classes(tree, make_shards, tmp_path):
    write(tmp_path / "names.tsv", "".join(f"{label}\tclass {label}\n" for label in range(LABELS)))
    source = shards(tree, tmp_path / "in", NAMES["as at Hugging Face"])
    output = tmp_path / "out"
    run = make_shards(source, output, "--size", "32", "--class-names", str(tmp_path / "names.tsv"))
    assert "48 images (36 train, 12 val) of 12 classes" in run.stdout
    classes = read_manifest(output).classes
    assert [(each.id, each.name) for each in classes] == [(str(n), f"class {n}") for n in range(LABELS)]


@pytest.mark.slow
@every_naming
def test_tars_behind_an_s3_url_give_the_same_images(s3, tree, tmp_path, names):
    url = f"{s3}/{tmp_path.name}"
    upload(shards(tree, tmp_path, names), url)
    sources = find_sources(url, None, 0)
    assert all(source.file.startswith(f"{url}/") for source in sources.splits["train"])
    assert [images(sources, split) for split in tree] == [expected(tree, split) for split in tree]


def test_a_sample_behind_a_url_costs_one_request(monkeypatch):
    whole = {
        f"{n}.{kind}": b"7" if kind == "cls" else bytes(9000) for n in range(20) for kind in ("cls", "jpg")
    }
    for name in ("train.tar", "val.tar"):
        fsspec.filesystem("memory").pipe_file(f"/requests/{name}", tar_of(whole))
    asked, read = [], storage.read
    monkeypatch.setattr(storage, "read", lambda *arguments: asked.append(arguments) or read(*arguments))
    find_sources("memory://requests", None, 0)
    assert sum(file.endswith(".tar") for file, *_ in asked) == 2 * (20 + 1)  # including the end of each tar


@settings(max_examples=50)
@given(sizes=st.lists(st.sampled_from([0, 1, 511, 512, 3000, 7000, 9000, 20000]), max_size=8))
def test_reading_ahead_gives_the_same_members_and_stops_at_the_end(tmp_path_factory, sizes):
    tar = tar_of({f"{number}": bytes([number]) * size for number, size in enumerate(sizes, 1)})
    path = tmp_path_factory.mktemp("ahead") / "a.tar"
    path.write_bytes(tar + b"beyond")
    read, found = ReadAhead(len(tar)), []
    for member in members(str(path), 0, len(tar), read):
        assert read(str(path), member.offset, member.size) == storage.read(
            str(path), member.offset, member.size
        )
        assert read.start + len(read.content) <= len(tar)
        found.append(member)
    assert found == list(members(str(path), 0, len(tar)))


PARTS = st.lists(st.sampled_from(["a", "b", "a.b", "_", "é"]), min_size=1, max_size=3).map("/".join)


@settings(max_examples=50)
@given(
    keys=st.lists(PARTS.map(lambda path: f"{path}/k"), min_size=1, max_size=6, unique=True),
    kinds=st.permutations(["cls", "JPG", "json", "seg.png"]),
    label=st.sampled_from([b"%d", b" %d\n", b"0%d"]),
)
def test_samples_are_those_that_webdataset_reads(tmp_path_factory, keys, kinds, label):
    content = {"cls": lambda n: label % n, "JPG": lambda n: b"image %d" % n}
    tar = {
        f"{key}.{kind}": content.get(kind, lambda n: b"{}")(number)
        for number, key in enumerate(keys)
        for kind in kinds
    }
    root = tmp_path_factory.mktemp("samples")
    for name in ("train.tar", "val.tar"):
        write(root / name, tar_of(tar))
    pipeline = webdataset.WebDataset(str(root / "train.tar"), shardshuffle=False)
    theirs = [(f"train.tar/{s['__key__']}.JPG", int(s["cls"]), s["jpg"]) for s in pipeline]
    ours = find_sources(root, None, 0)
    assert ours.classes == [str(number) for number in range(len(keys))]
    assert [(s.path, s.label, storage.read(s.file, s.offset, s.size)) for s in ours.splits["train"]] == theirs


def pair(key: str, label: int) -> dict[str, bytes]:
    return {f"{key}.cls": b"%d" % label, f"{key}.jpg": b"image"}


def test_labels_with_gaps_become_consecutive(tmp_path):
    write(tmp_path / "train.tar", tar_of(pair("a", 5) | pair("b", 10) | pair("c", 0)))
    write(tmp_path / "val.tar", tar_of(pair("a", 10)))
    sources = find_sources(tmp_path, None, 0)
    assert sources.classes == ["0", "5", "10"]
    assert [source.label for source in sources.splits["train"]] == [0, 1, 2]
    assert [source.label for source in sources.splits["val"]] == [2]


def ten_of_each(first: int) -> bytes:
    return tar_of({k: v for n in range(first, first + 20) for k, v in pair(f"{n:03d}", n % 2).items()})


@pytest.mark.parametrize("name", ["constraint-%d.tar", "trainval/%d.tar", "train-%d.tar"])
def test_without_validation_tars_a_part_of_each_class_is_held_out(tmp_path, name):
    for number in range(3):
        write(tmp_path / (name % number), ten_of_each(20 * number))
    splits = find_sources(tmp_path, 0.2, 0).splits
    counts = {
        split: [sum(source.label == label for source in found) for label in (0, 1)]
        for split, found in splits.items()
    }
    assert counts == {"train": [24, 24], "val": [6, 6]}
    assert len({source.path for found in splits.values() for source in found}) == 60


def test_files_outside_splits_and_samples_are_listed_as_strays(tmp_path):
    write(tmp_path / "train/0.tar", tar_of({"a.jpg": b"image", "notes": b"", "a.cls": b"0", "b.json": b"{}"}))
    write(tmp_path / "val/0.tar", tar_of({".c.jpg": b"image"} | pair("a", 0)))
    write(tmp_path / "test/0.tar", b"is not read")
    write(tmp_path / "other/0.tar", b"is not read either")
    sources = find_sources(tmp_path, None, 0)
    assert sources.strays == ["other/0.tar", "train/0.tar/notes", "train/0.tar/b"]
    assert sources.unused == ["test/0.tar"]
    assert sources.litter == {"val/0.tar/.c.jpg"}
    assert {split: len(found) for split, found in sources.splits.items()} == {"train": 1, "val": 1}


def test_a_tar_beside_class_folders_does_not_hide_them(tmp_path):
    for path in ("train/a/1.webp", "val/a/1.JPEG", "train-0.tar", "train/a/more.tar"):
        write(tmp_path / path, b"")
    sources = find_sources(tmp_path, None, 0)
    assert [source.path for source in sources.splits["train"]] == ["train/a/1.webp", "train/a/more.tar"]
    assert sources.splits["val"] == [SourceImage("val/a/1.JPEG", 0, f"{tmp_path}/val/a/1.JPEG")]


GOOD = tar_of(pair("a", 0))
LABEL = r"the label \(\.cls\) must be one decimal number"
TARS = {
    "no label": (
        {"x/b.jpg": b"", "x/b.json": b""},
        r"sample x/b: there is an image but no label: .* \(CSV\)",
    ),
    "a label in letters": ({"b.jpg": b"", "b.cls": b"dog"}, rf"sample b: {LABEL}, not b'dog'"),
    "a negative label": ({"b.jpg": b"", "b.cls": b"-1"}, rf"sample b: {LABEL}, not b'-1'"),
    "a fraction": ({"b.jpg": b"", "b.cls": b"1.0"}, rf"sample b: {LABEL}, not b'1\.0'"),
    "two numbers": ({"b.jpg": b"", "b.cls": b"1 2"}, rf"sample b: {LABEL}, not b'1 2'"),
    "an empty label": ({"b.jpg": b"", "b.cls": b""}, rf"sample b: {LABEL}, not b''"),
    "two labels": ({"b.jpg": b"", "b.cls": b"1", "b.CLS": b"2"}, rf"sample b: {LABEL}, not b'1 and 2'"),
    "two images": (
        {"b.jpg": b"", "b.png": b"", "b.cls": b"1"},
        "sample b: there are two images, b.jpg and b.png",
    ),
    "labels first": ({"b.cls": b"1", "c.cls": b"1", "b.jpg": b""}, "sample b: there is a label .* no image"),
    "nothing of use": ({"b.txt": b"", "c": b""}, r"no sample with an image \(\.jpg, …\) and its label"),
}


@pytest.mark.parametrize(("files", "message"), TARS.values(), ids=TARS)
def test_a_tar_with_other_samples_is_refused_by_name(tmp_path, files, message):
    write(tmp_path / "train/0.tar", GOOD)
    write(tmp_path / "val/0.tar", tar_of(files))
    assert_refused(tmp_path, f"(val/0.tar, |tars of val.*){message}")


FOLDERS = {
    "only train": (["train-0.tar"], None, r"has train-0\.tar, but no tar is named val: .* --val-fraction"),
    "no split": (["a/0.tar"], None, r"has a/0\.tar, but no tar is named val: .* --val-fraction 0\.1"),
    "only val": (["val-0.tar", "test-0.tar"], None, r"has val-0\.tar, but no tar is named train"),
    "only val, and a fraction": (["val-0.tar"], 0.1, r"has val-0\.tar, but no tar is named train"),
    "val, and a fraction": (["train-0.tar", "val-0.tar"], 0.1, "omit --val-fraction"),
    "both in one name": (["train/val-0.tar", "val/1.tar"], None, "train/val-0.tar below --input names both"),
    "too few to hold one out": (["0.tar"], 0.1, "holds out no image .*: add images"),
}


@pytest.mark.parametrize(("paths", "fraction", "message"), FOLDERS.values(), ids=FOLDERS)
def test_tars_without_clear_splits_are_refused(tmp_path, paths, fraction, message):
    for path in paths:
        write(tmp_path / path, GOOD)
    assert_refused(tmp_path, message, fraction)


def test_a_class_only_in_val_is_refused(tmp_path):
    write(tmp_path / "train.tar", GOOD)
    write(tmp_path / "val.tar", tar_of(pair("b", 3)))
    assert_refused(tmp_path, r"\(tars of val\) has classes that are not in .* \(tars of train\): 3\.")


def test_a_truncated_tar_is_refused_by_name(tmp_path):
    write(tmp_path / "train.tar", GOOD)
    write(tmp_path / "val.tar", GOOD[:1300])
    assert_refused(tmp_path, r"val\.tar is truncated")
