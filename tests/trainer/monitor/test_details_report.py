"""The report on the details of an evaluation, from three classes to a thousand."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

from pipeline.loader import Dataset
from pipeline.manifest import Class
from trainer.details import MISTAKES, Details, Mistake
from trainer.monitor.details_report import write_evaluation

WORDS = ["crane (bird)", "crane (machine for heavy loads)", "猫", "кошка", "قط أسود", "$x_1^2$", "a|b"]


def details_of(classes: int, mistakes: int) -> Details:
    """Each class has eight right images, and those below `mistakes` one that is taken for the next class."""
    pairs = {(label, label): 8 for label in range(classes)}
    wrong = [(label, (label + 1) % classes) for label in range(mistakes)]
    images = [Mistake(0.9, *pair, sample % 20) for sample, pair in enumerate(wrong[:MISTAKES])]
    return Details(pairs | dict.fromkeys(wrong, 1), images)


def dataset_of(packed, classes: int) -> Dataset:
    """Return the packed pictures as a dataset that says it has other classes."""
    dataset = Dataset(packed)
    dataset.reader("val")
    named = tuple(
        Class(id=f"n{n:08d}", name=WORDS[n] if n < len(WORDS) else f"class {n}") for n in range(classes)
    )
    dataset.manifest = dataset.manifest.model_copy(update={"classes": named})
    return dataset


@pytest.mark.parametrize(
    ("classes", "has_matrix"), [(3, True), (10, True), (30, True), (31, False), (1000, False)]
)
def test_the_report_shows_a_matrix_only_where_it_is_readable(packed, tmp_path, classes, has_matrix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for letters that the font lacks
        details = details_of(classes, mistakes=min(classes, 100))
        path = write_evaluation(tmp_path / "new/folder", "title", details, dataset_of(packed, classes), "val")
    text = path.read_text()
    assert text.startswith("# Evaluation of title\n")
    linked = set(re.findall(r"\]\(([^)]*)\)", text))
    assert {file.name for file in path.parent.iterdir()} == linked | {path.name}
    assert ("confusion.png" in linked) == has_matrix
    for name in (name for name in linked if name.endswith(".png")):
        with Image.open(path.parent / name) as picture:
            assert 200 < min(picture.size) <= max(picture.size) < 2000, name
    assert "| crane (bird) | 9 | 1 | 11.1% | crane (machine for heavy loads) |" in text
    assert text.count("11.1%") == min(classes, 20)


def test_without_errors_there_are_no_pictures_of_them(packed, tmp_path):
    path = write_evaluation(tmp_path, "title", details_of(3, mistakes=0), dataset_of(packed, 3), "val")
    assert "There are no errors." in path.read_text()
    assert {file.name for file in tmp_path.glob("*.png")} == {"confusion.png"}


def test_a_mistake_whose_image_is_damaged_is_grey(packed_copy, tmp_path):
    dataset = dataset_of(packed_copy, 3)
    with open(packed_copy / "val-000000.tar", "r+b") as file:
        file.seek(dataset.reader("val").rows["offset"][0])
        file.write(b"damage")
    write_evaluation(tmp_path, "title", details_of(3, mistakes=2), dataset, "val")
    with Image.open(tmp_path / "mistakes.png") as sheet:
        colours = np.asarray(sheet.convert("RGB"))[60, [60, 220]]  # in the middle of both tiles
    grey = np.array([211, 211, 211])
    assert (colours[0] == grey).all()
    assert (colours[1] != grey).any()
