"""Labels of validation images in one folder, and names of classes, from the files that people have."""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.packing.sources.class_names import read_class_names
from pipeline.packing.sources.find import find_sources, open_folder
from pipeline.packing.sources.labels import Annotations
from pipeline.packing.sources.listing import SourceError
from tests.trees import assert_refused, tar_of, touch, write

# In the order of the devkit's numbers, which is not the alphabet's.
CLASSES = {"n03": "kit fox, Vulpes macrotis", "n01": "tench", "n02": "crane"}
# The labels that all forms give four images; the numbers in ground truths begin at 1.
LABELS = {"x_1.JPEG": "n01", "x_2.JPEG": "n03", "x_3.JPEG": "n01", "x_4.JPEG": "n02"}
NUMBERS = "2\n1\n2\n3\n"


def meta(year: int = 2012) -> bytes:
    """Return the devkit's meta.mat: the classes, and then a node of the tree above them."""
    rows = [(n, wnid, words) for n, (wnid, words) in enumerate(CLASSES.items(), 1)]
    rows.append((4, "n99", "animal"))
    synsets = np.array(rows, [(f"ILSVRC{year}_ID", object), ("WNID", object), ("words", object)])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    return buffer.getvalue()


def devkit(year: int = 2012) -> bytes:
    files = {f"ILSVRC{year}_validation_ground_truth.txt": NUMBERS.encode(), "meta.mat": meta(year)}
    tar = tar_of({f"ILSVRC{year}_devkit/data/{name}": content for name, content in files.items()})
    return gzip.compress(tar)


TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE = "ImageId,PredictionString\n"
KAGGLE += "x_3,n01 1 2 3 4 n01 5 6 7 8 \nx_1,n01 0 0 9 9 \nx_2,n03 1 1 2 2 \nx_4,n02 1 1 2 2\n"
MAP = "n03 1 kit_fox\nn01 2 tench\nn02 3 crane\n"
FORMS = {
    "Kaggle's solution": {"LOC_val_solution.csv": KAGGLE},
    "files and ids": {"val.txt": "x_2.JPEG n03\nval/x_1.JPEG n01\nx_4.JPEG\tn02\nx_3.JPEG n01\n"},
    "ids alone": {"synset_labels.txt": "n01\nn03\nn01\nn02\n"},
    "ids alone, TensorFlow's name": {"imagenet_2012_validation_synset_labels.txt": "n01\nn03\nn01\nn02\n"},
    "numbers and a class list": {TRUTH: NUMBERS, "map_clsloc.txt": "n03\nn01\nn02\n"},
    "numbers and a later devkit's class list": {TRUTH: NUMBERS, "data/map_clsloc.txt": MAP},
    "devkit": {"ILSVRC2012_devkit_t12.tar.gz": devkit},
    "devkit, extracted": {f"ILSVRC2012_devkit_t12/data/{TRUTH}": NUMBERS,
                          "ILSVRC2012_devkit_t12/data/meta.mat": meta},
    "devkit's data": {f"data/{TRUTH}": NUMBERS, "data/meta.mat": meta},
    "devkit of 2010": {"ILSVRC2010_devkit-1.0.tar.gz": lambda: devkit(2010)},
    "numbers, and meta.mat alone": {TRUTH: NUMBERS, "meta.mat": meta},
}  # fmt: skip


def fill(root: Path, files: dict) -> Annotations:
    for name, content in files.items():
        write(root / name, content() if callable(content) else content)
    return Annotations(open_folder(str(root)))


@pytest.mark.parametrize("files", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_labels(tmp_path, files):
    assert fill(tmp_path, files).classes(sorted(LABELS)) == LABELS


ERRORS = {
    "nothing": ({}, "has no labels for the validation images.*devkit"),
    "numbers alone": ({TRUTH: NUMBERS}, "put the devkit's meta.mat next to it, or map_clsloc.txt"),
    "a number above the maximum": (
        {TRUTH: "2\n1\n2\n4\n", "map_clsloc.txt": MAP},
        "line 4: '4' is not the number of",
    ),
    "zero": ({TRUTH: "2\n1\n0\n3\n", "map_clsloc.txt": MAP}, "line 3: '0' is not the number of a class"),
    "a word": ({TRUTH: "2\n1\nn01\n3\n", "map_clsloc.txt": MAP}, "line 3: 'n01' is not the number of"),
    "too few": ({TRUTH: "2\n1\n", "map_clsloc.txt": MAP}, "has 2 labels, but there are 4 validation images"),
    "too few ids": ({"val.txt": "n01\nn02\n"}, "has 2 labels, but there are 4"),
    "missing labels": ({"val.txt": "x_1.JPEG n01\nx_3.JPEG n01\n"}, "lacks labels for 2 images.* x_2.JPEG"),
    "mixed lines": ({"val.txt": "x_1.JPEG n01\nn01\n"}, "val.txt mixes two forms of lines"),
    "not text": ({"val.txt": b"\xff\n"}, "val.txt is not UTF-8 text"),
    "other columns": ({"LOC_val_solution.csv": "a,b\n1,2\n"}, "solution.csv, line 2: there is no ImageId"),
    "an empty prediction": (
        {"LOC_val_solution.csv": "ImageId,PredictionString\nx_1,\n"},
        "line 2: there is no",
    ),
    "an open quote": (
        {"LOC_val_solution.csv": 'ImageId,PredictionString\nx_1,"n01 ' + "1 " * 70_000},
        "there is no ImageId",
    ),
    "a short row": ({"LOC_val_solution.csv": "ImageId,PredictionString\nx_1\n"}, "line 2: there is no"),
    "numbers out of order": ({TRUTH: NUMBERS, "map_clsloc.txt": "n03 1\nn01 3\n"}, "line 2: the number is 3"),
    "a class list in alphabetical order": (
        {TRUTH: NUMBERS, "map_clsloc.txt": "".join(f"n{n:08d}\n" for n in range(1000))},
        "alphabetical order",
    ),
    "a truncated devkit": ({"ILSVRC2012_devkit_t12.tar.gz": lambda: devkit()[:200]}, "devkit.* is damaged"),
    "a devkit that is not a tar": ({"ILSVRC2012_devkit_t12.tar.gz": b"<html>"}, "devkit.* is damaged"),
    "a broken meta.mat": ({TRUTH: NUMBERS, "meta.mat": b"MATLAB" * 99}, "meta.mat is not the devkit's"),
}


@pytest.mark.parametrize(("files", "message"), ERRORS.values(), ids=ERRORS)
def test_unreliable_labels_are_refused(tmp_path, files, message):
    with pytest.raises(SourceError, match=message) as refusal:
        fill(tmp_path, files).classes(sorted(LABELS))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_scipy_the_message_names_both_solutions(tmp_path, monkeypatch):
    annotations = fill(tmp_path, FORMS["devkit's data"])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(SourceError, match=r"\[imagenet\].* map_clsloc.txt for the labels and --class-names"):
        annotations.classes(sorted(LABELS))


NAMES = {
    "LOC_synset_mapping.txt": "".join(f"{wnid} {words}\n" for wnid, words in CLASSES.items()),
    "synset_words.txt": "".join(f"{wnid} {words}\n" for wnid, words in CLASSES.items()),
    "data/meta.mat": meta,
    "ILSVRC2012_devkit_t12.tar.gz": devkit,
}


@pytest.mark.parametrize("name", NAMES)
def test_class_names_are_found_unless_others_are_given(tmp_path, name):
    touch(tmp_path, *(f"{split}/{wnid}/1.JPEG" for split in ("train", "val") for wnid in CLASSES))
    assert find_sources(tmp_path, None, 0).names == {}
    fill(tmp_path, {name: NAMES[name]})
    names = find_sources(tmp_path, None, 0).names
    assert {wnid: names[wnid] for wnid in CLASSES} == CLASSES
    (tmp_path / "mine").write_text("n01 mine\n")
    assert find_sources(tmp_path, None, 0, tmp_path / "mine").names == {"n01": "mine"}


def test_a_validation_class_without_training_images_is_refused(tmp_path):
    touch(tmp_path, "train/n01/1.JPEG", "val/x_1.JPEG")
    (tmp_path / "val.txt").write_text("x_1.JPEG 65\n")  # Caffe's numbers are not class ids
    assert_refused(tmp_path, r"/val has classes that are not in .*: 65\.")


def test_class_names_are_read_from_imagenets_synset_words(tmp_path):
    path = tmp_path / "synset_words.txt"
    path.write_text("n02691156 airliner, plane\nn02123045 tabby, tabby cat\n\nn00000000\n")
    names = {"n02691156": "airliner, plane", "n02123045": "tabby, tabby cat"}
    assert read_class_names(path, list(names)) == names


def test_class_names_of_a_table_end_at_the_next_tab(tmp_path):
    path = tmp_path / "classes.tsv"
    path.write_text("n02691156\tairplanes (airplane, aeroplane)\t140\t30\nn01\tçà et là\n", encoding="utf-8")
    names = {"n02691156": "airplanes (airplane, aeroplane)", "n01": "çà et là"}
    assert read_class_names(path, list(names)) == names


def test_class_names_that_cannot_be_read_are_an_error(tmp_path):
    (tmp_path / "latin1").write_bytes(b"n01 caf\xe9")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "latin1"):
        with pytest.raises(SourceError, match=r"--class-names .* cannot be read"):
            read_class_names(path, [])
