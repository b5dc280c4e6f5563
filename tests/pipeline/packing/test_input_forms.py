"""A dataset gives the same sources in every supported form, local or behind a URL."""

import csv
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.packing.sources.find import Sources, find_sources
from pipeline.packing.storage import read
from tests.helpers import free_port
from tests.trees import (
    Tree,
    assert_refused,
    class_folders,
    encode,
    packed_files,
    tar_of,
    tars,
    touch,
    upload,
    val_files,
    write,
)
from tools.draw_pictures import class_names, draw


def tars_of_2010(tree: Tree, root: Path) -> Path:
    """Write tars in which class tars and images are in folders, and a list of labels."""
    inside = {f"train/{wnid}.tar": tar_of(files) for wnid, files in tree["train"].items()}
    flat = val_files(tree)
    write(root / "ILSVRC2010_images_train.tar", tar_of(inside))
    write(root / "ILSVRC2010_images_val.tar", tar_of({f"val/{name}": c for name, (_, c) in flat.items()}))
    write(root / "val.txt", "".join(f"{name} {wnid}\n" for name, (wnid, _) in flat.items()))
    return root


def class_tars(tree: Tree, root: Path) -> Path:
    """ILSVRC's tar of class tars, extracted once; the labels from a list."""
    for wnid, files in tree["train"].items():
        write(root / "train" / f"{wnid}.tar", tar_of(files))
    flat = val_files(tree)
    for name, (_, content) in flat.items():
        write(root / "val" / name, content)
    write(root / "val.txt", "".join(f"{name} {wnid}\n" for name, (wnid, _) in flat.items()))
    return root


def flat_val(tree: Tree, root: Path) -> Path:
    """Write class folders for train and one folder for val."""
    class_folders(tree, root, ("train",))
    for name, (_, content) in val_files(tree).items():
        write(root / "val" / name, content)
    return root


def kaggle(tree: Tree, root: Path) -> Path:
    flat_val(tree, root / "ILSVRC/Data/CLS-LOC")
    rows = "".join(f"{name[:-5]},{wnid} 1 2 3 4 \n" for name, (wnid, _) in val_files(tree).items())
    write(root / "LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}")
    return root


def kaggle_inside(tree: Tree, root: Path) -> Path:
    return kaggle(tree, root) / "ILSVRC"


def rows(tree: Tree) -> dict[str, list[str]]:
    """Return the columns of a table, whose rows are not sorted."""
    files = [(split, wnid, name) for split in tree for wnid in tree[split] for name in tree[split][wnid]]
    files = files[::2] + files[1::2]
    return {
        "split": [split for split, _, _ in files],
        "label": [wnid for _, wnid, _ in files],
        "path": ["/".join(file) for file in files],
    }


def table(tree: Tree, root: Path) -> Path:
    class_folders(tree, root)
    columns = rows(tree)
    with open(root / "images.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return root / "images.csv"


def parquet_table(tree: Tree, root: Path) -> Path:
    parquet.write_table(pyarrow.table(rows(tree)), class_folders(tree, root) / "images.parquet")
    return root / "images.parquet"


FORMS = (class_folders, class_tars, tars, tars_of_2010, kaggle, kaggle_inside, table, parquet_table)
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def listed(sources: Sources) -> dict[str, list[tuple[str, int, bytes]]]:
    """Return paths, labels and bytes, which are the same in every form, in order."""
    return {
        split: [(s.path, s.label, read(s.file, s.offset, s.size)) for s in files]
        for split, files in sources.splits.items()
    }


def expected(tree: Tree) -> dict[str, list[tuple[str, int, bytes]]]:
    return {
        split: [
            (f"{split}/{wnid}/{name}", label, classes[wnid][name])
            for label, wnid in enumerate(sorted(tree["train"]))
            for name in sorted(classes.get(wnid, ()))
        ]
        for split, classes in tree.items()
    }


@st.composite
def trees(draw) -> Tree:
    letters = st.text("ab-_ é1", min_size=1, max_size=6).filter(lambda text: text == text.strip(" -"))
    ids = draw(st.lists(letters.map(lambda t: f"n{t.replace(' ', '')}"), min_size=1, max_size=4, unique=True))
    content = st.binary(max_size=700)
    files = st.dictionaries(letters.map(lambda text: f"{text}.JPEG"), content, min_size=1, max_size=4)
    val = draw(st.lists(st.tuples(st.sampled_from(ids), content), min_size=1, max_size=6))
    tree: Tree = {"train": {wnid: draw(files) for wnid in ids}, "val": {}}
    for number, (wnid, each) in enumerate(val):
        tree["val"].setdefault(wnid, {})[f"ILSVRC2012_val_{number:08d}.JPEG"] = each
    return tree


@settings(max_examples=25)
@given(tree=trees())
@every_form
def test_every_form_of_a_dataset_gives_the_same_sources(tmp_path_factory, form, tree):
    sources = find_sources(form(tree, tmp_path_factory.mktemp("form")), None, 0)
    assert sources.classes == sorted(tree["train"])
    assert listed(sources) == expected(tree)
    assert sources.strays == []


@pytest.fixture(scope="module")
def pictures_tree() -> Tree:
    """Drawn pictures of four classes, 5 for training and 2 for validation in each, and a broken one."""
    tree: Tree = {"train": {}, "val": {}}
    for label, name in enumerate(class_names()[:4]):
        for split, count in (("train", 5), ("val", 2)):
            for number in range(count):
                image = draw(name, np.random.default_rng((label, number)))
                tree[split].setdefault(name, {})[f"{split}_{2 * label + number:08d}.JPEG"] = encode(image)
    tree["train"][class_names()[0]]["broken.JPEG"] = b"no image"
    return tree


@pytest.fixture(scope="module")
def first(pictures_tree, tmp_path_factory) -> dict[str, bytes]:
    """The files packed from the class folders."""
    root = tmp_path_factory.mktemp("first")
    return packed_files(class_folders(pictures_tree, root / "folders"), root / "a")


@every_form
def test_every_form_packs_to_the_same_bytes(pictures_tree, first, tmp_path, form):
    assert b"broken.JPEG\trejected\tnot an image" in first["report.tsv"]
    assert len([name for name in first if name.endswith(".tar")]) == 3 + 2
    second = packed_files(form(pictures_tree, tmp_path / "form"), tmp_path / "b")
    assert [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)] == []


TREE: Tree = {
    "train": {"n02": {"b.JPEG": b"1" * 600, "a.JPEG": b"2"}, "n-1": {"é c.JPEG": b"3"}},
    "val": {"n02": {"ILSVRC2012_val_00000001.JPEG": b"4"}, "n-1": {"ILSVRC2012_val_00000002.JPEG": b"5"}},
}


@pytest.mark.slow
@every_form
def test_every_form_behind_an_s3_url_gives_the_same_sources(s3, tmp_path, form):
    source = form(TREE, tmp_path)
    url = f"{s3}/{form.__name__}"
    upload(tmp_path, url)
    inside = source.relative_to(tmp_path)
    sources = find_sources(f"{url}/{inside}" if source != tmp_path else f"{url}/", None, 0)
    assert listed(sources) == expected(TREE)
    assert all(source.file.startswith(url) for split in sources.splits.values() for source in split)


@pytest.mark.slow
def test_packing_from_s3_gives_the_bytes_of_packing_locally(s3, pictures_tree, tmp_path):
    upload(tars(pictures_tree, tmp_path / "in"), f"{s3}/pictures")
    assert packed_files(f"{s3}/pictures", tmp_path / "a") == packed_files(tmp_path / "in", tmp_path / "b")


@pytest.mark.parametrize("form", [class_folders, kaggle, table], ids=lambda form: form.__name__)
def test_forms_behind_an_http_url_give_the_same_sources(website, tmp_path, form):
    tree: Tree = {split: {"n1": {f"{split}_1.JPEG": b"1"}, "n2": {f"{split}_2.JPEG": b"2"}} for split in TREE}
    inside = form(tree, tmp_path / "in").relative_to(tmp_path)
    assert listed(find_sources(f"{website}/{inside}", None, 0)) == expected(tree)


def test_a_server_that_does_not_answer_is_not_an_empty_folder():
    assert_refused(f"http://127.0.0.1:{free_port()}/in", "cannot be read: Cannot connect")


def test_a_folder_a_bucket_and_a_table_hold_out_the_same_images(tmp_path):
    classes = [f"class{number % 2}" for number in range(20)]
    paths = [f"{name}/{number}.jpg" for number, name in enumerate(classes)]
    folder = touch(tmp_path / "in", *paths, "notes")
    upload(folder, "memory://flat")
    local, remote = (find_sources(source, 0.25, 3) for source in (folder, "memory://flat"))
    assert listed(local) == listed(remote)
    assert local.strays == remote.strays == ["notes"]
    rows = (f"{path},{name}\n" for path, name in zip(paths, classes, strict=True))
    write(folder / "images.csv", f"path,label\n{''.join(rows)}")
    assert listed(find_sources(folder / "images.csv", 0.25, 3)) == listed(local)


REFUSALS = {
    "an empty bucket": ("memory://nothing", "is not a folder, or it is empty"),
    "an unknown protocol": ("nosuch://x", "nosuch"),
}
REFUSALS_OF_S3 = {
    "no bucket": ("s3://absent-bucket", "absent-bucket"),
    "a missing table": ("s3://images/absent.csv", "absent.csv cannot be read"),
}


@pytest.mark.parametrize(("url", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_url_without_images_is_refused(url, message):
    assert_refused(url, message)


@pytest.mark.slow
@pytest.mark.parametrize(("url", "message"), REFUSALS_OF_S3.values(), ids=REFUSALS_OF_S3)
def test_an_s3_url_without_images_is_refused(s3, url, message):
    assert_refused(url, message)


def test_a_truncated_tar_behind_a_url_is_refused_by_name(tmp_path):
    tars(TREE, tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:3000])
    upload(tmp_path, "memory://short")
    assert_refused("memory://short", r"memory://short/ILSVRC2012_img_train\.tar is truncated")
