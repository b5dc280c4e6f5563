"""One dataset in each form that people have it in, here and behind URLs: always the same sources."""

import csv
import io
import socket
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.packing.sources.find import Sources, find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.packing.storage import read
from tests.trees import Tree, class_folders, packed_files, tar_of, tars, upload, val_files, write
from tools.draw_pictures import class_names, draw


def tars_of_2010(tree: Tree, root: Path) -> Path:
    """Class tars and images in folders inside; the labels from a list."""
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
    """Train extracted into class folders, val into one folder."""
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
    """A table's columns; the rows are not in order."""
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
    """All that is the same in every form: paths, labels and bytes, in their order."""
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
    """Drawn pictures of four classes, 5 to train on and 2 to validate on; one of them broken."""
    tree: Tree = {"train": {}, "val": {}}
    for label, name in enumerate(class_names()[:4]):
        for split, count in (("train", 5), ("val", 2)):
            for number in range(count):
                buffer = io.BytesIO()
                draw(name, np.random.default_rng((label, number))).save(buffer, "JPEG")
                tree[split].setdefault(name, {})[f"{split}_{2 * label + number:08d}.JPEG"] = buffer.getvalue()
    tree["train"][class_names()[0]]["broken.JPEG"] = b"no image"
    return tree


@pytest.fixture(scope="module")
def first(pictures_tree, tmp_path_factory) -> dict[str, bytes]:
    """What is packed of the class folders."""
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
def test_the_same_behind_a_url_of_s3(s3, tmp_path, form):
    place = form(TREE, tmp_path)
    url = f"{s3}/{form.__name__}"
    upload(tmp_path, url)
    inside = place.relative_to(tmp_path)
    sources = find_sources(f"{url}/{inside}" if place != tmp_path else f"{url}/", None, 0)
    assert listed(sources) == expected(TREE)
    assert all(source.file.startswith(url) for split in sources.splits.values() for source in split)


@pytest.mark.slow
def test_packing_from_s3_gives_the_same_bytes_as_from_here(s3, pictures_tree, tmp_path):
    upload(tars(pictures_tree, tmp_path / "in"), f"{s3}/pictures")
    assert packed_files(f"{s3}/pictures", tmp_path / "a") == packed_files(tmp_path / "in", tmp_path / "b")


@pytest.fixture
def website(tmp_path) -> Iterator[str]:
    """The URL of a server of tmp_path that lists folders as links."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("form", [class_folders, kaggle, table], ids=lambda form: form.__name__)
def test_the_same_behind_a_url_of_http(website, tmp_path, form):
    tree: Tree = {split: {"n1": {f"{split}_1.JPEG": b"1"}, "n2": {f"{split}_2.JPEG": b"2"}} for split in TREE}
    inside = form(tree, tmp_path / "in").relative_to(tmp_path)
    assert listed(find_sources(f"{website}/{inside}", None, 0)) == expected(tree)


def test_a_server_that_does_not_answer_is_told_from_an_empty_folder():
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        with pytest.raises(SourceError, match="cannot be read: Cannot connect"):
            find_sources(f"http://127.0.0.1:{held.getsockname()[1]}/in", None, 0)


def flat_folders(root: Path) -> None:
    for number in range(20):
        write(root / f"class{number % 2}/{number}.jpg", b"x")
    write(root / "notes", b"")


def flat_table(root: Path) -> None:
    rows = "".join(f"class{number % 2}/{number}.jpg,class{number % 2}\n" for number in range(20))
    write(root / "images.csv", f"path,label\n{rows}")


def test_a_table_or_a_bucket_holds_out_what_the_folder_does(tmp_path):
    flat_folders(tmp_path / "in")
    upload(tmp_path / "in", "memory://flat")
    here, there = (find_sources(place, 0.25, 3) for place in (tmp_path / "in", "memory://flat"))
    assert listed(here) == listed(there)
    assert here.strays == there.strays == ["notes"]
    flat_table(tmp_path / "in")
    assert listed(find_sources(tmp_path / "in/images.csv", 0.25, 3)) == listed(here)


REFUSALS = {
    "an empty bucket": ("memory://nothing", "is not a folder, or it is empty"),
    "an unknown kind": ("nosuch://x", "nosuch"),
}
REFUSALS_OF_S3 = {
    "no bucket": ("s3://absent-bucket", "absent-bucket"),
    "a table that is not there": ("s3://images/absent.csv", "absent.csv cannot be read"),
}


def assert_refused(url: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as refusal:
        find_sources(url, None, 0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("url", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_there_is_refused(url, message):
    assert_refused(url, message)


@pytest.mark.slow
@pytest.mark.parametrize(("url", "message"), REFUSALS_OF_S3.values(), ids=REFUSALS_OF_S3)
def test_what_is_not_there_in_s3_is_refused(s3, url, message):
    assert_refused(url, message)


def test_a_tar_behind_a_url_that_is_cut_short_is_refused(tmp_path):
    tars(TREE, tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:3000])
    upload(tmp_path, "memory://short")
    with pytest.raises(SourceError, match=r"memory://short/ILSVRC2012_img_train\.tar is truncated"):
        find_sources("memory://short", None, 0)
