"""The details of an evaluation, compared with counts made by hand, and their tables."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.documents import ContentError
from pipeline.graph import Decoding
from pipeline.loader import Dataset, evaluation_loader
from pipeline.manifest import Class
from trainer import details as details_module
from trainer.details import (
    BY_CLASS,
    CONFUSION,
    WORST,
    ClassErrors,
    Details,
    Mistake,
    Recorder,
    Tally,
    read_details,
)
from trainer.evaluate import evaluate
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World

ALONE = World(0, 1, 0, torch.device("cpu"))
CLASSES = tuple(Class(id=f"id{label}", name=name) for label, name in enumerate(("cat", "dog, hound", "猫")))
# By hand: probabilities of three classes, the label, and the number of the image in its split.
BATCH = [
    ((0.8, 0.1, 0.1), 0, 7),  # right
    ((0.1, 0.7, 0.2), 0, 3),  # a cat taken for a dog
    ((0.1, 0.2, 0.7), 1, 2),  # a dog taken for class 2, as confidently
    ((0.3, 0.6, 0.1), 0, 9),  # a cat taken for a dog, less confidently
    ((0.1, 0.9, 0.0), 1, 4),  # right
]
PAIRS = {(0, 0): 1, (0, 1): 2, (1, 1): 1, (1, 2): 1}
MISTAKES = [Mistake(0.7, 1, 2, 2), Mistake(0.7, 0, 1, 3), Mistake(0.6, 0, 1, 9)]


def record(images) -> Recorder:
    recorder = Recorder(SimpleNamespace(samples=np.array([sample for *_, sample in images])))
    scores = torch.tensor([probabilities for probabilities, *_ in images], dtype=torch.float64).log()
    recorder.add(scores, scores.argmax(1), torch.tensor([label for _, label, _ in images]))
    return recorder


def assert_by_hand(details: Details, mistakes: list[Mistake] = MISTAKES) -> None:
    assert details.pairs == PAIRS
    assert [image[1:] for image in details.mistakes] == [image[1:] for image in mistakes]
    assert [image.probability for image in details.mistakes] == pytest.approx(
        [image[0] for image in mistakes]
    )


def test_pairs_and_mistakes_are_those_counted_by_hand():
    details = record(BATCH).combine(ALONE)
    assert_by_hand(details)
    expected = [ClassErrors(0, 3, 2, 1), ClassErrors(1, 2, 1, 3), ClassErrors(2, 0, 0, 1)]
    assert details.by_class(3) == expected
    assert details.worst_pairs() == [(0, 1, 2), (1, 2, 1)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 1, 4, 2, 0)])
@pytest.mark.parametrize("cut", [0, 2, 5])
def test_processes_together_find_what_one_finds(order, cut, monkeypatch):
    """The least confident mistake does not fit. Which of them share a process does not matter."""
    monkeypatch.setattr(details_module, "MISTAKES", 2)
    images = [BATCH[index] for index in order]
    parts = [record(part) for part in (images[:cut], images[cut:]) if part]
    gathered = [(part.pairs, part.mistakes) for part in parts]
    two = SimpleNamespace(gather=lambda own: gathered)
    assert_by_hand(parts[0].combine(two), MISTAKES[:2])


@pytest.fixture
def dataset(packed) -> Dataset:
    return Dataset(packed)


def table(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_the_tables_have_their_documented_columns_and_are_read_back(dataset, tmp_path):
    details = record(BATCH).combine(ALONE)
    details.write(tmp_path, CLASSES, dataset.reader("val"))
    assert table(tmp_path / BY_CLASS) == [
        ["label", "id", "name", "images", "errors", "error", "predicted"],
        ["0", "id0", "cat", "3", "2", "0.666667", "1"],
        ["1", "id1", "dog, hound", "2", "1", "0.500000", "3"],
        ["2", "id2", "猫", "0", "0", "", "1"],
    ]
    assert table(tmp_path / CONFUSION) == [
        ["label", "id", "predicted_label", "predicted_id", "images"],
        ["0", "id0", "0", "id0", "1"],
        ["0", "id0", "1", "id1", "2"],
        ["1", "id1", "1", "id1", "1"],
        ["1", "id1", "2", "id2", "1"],
    ]
    head, first, *others = table(tmp_path / WORST)
    assert head[:4] == ["sample", "shard", "offset", "key"]
    assert head[4:] == ["label", "id", "predicted_label", "predicted_id", "probability"]
    # With 80 px, a tar header of 512 bytes is before each JPEG, and the key is the number in the split.
    reader = dataset.reader("val")
    assert first[:4] == ["2", "val-000000.tar", str(reader.rows["offset"][2]), reader.key(2)]
    assert first[4:] == ["1", "id1", "2", "id2", "0.700000"]
    assert len(others) == 2
    found = read_details(tmp_path, 3)
    assert found is not None
    assert_by_hand(found)


def test_a_mistake_whose_key_cannot_be_read_is_listed_without_it(packed_copy, tmp_path):
    reader = Dataset(packed_copy).reader("val")
    with open(packed_copy / "val-000000.tar", "r+b") as file:
        file.write(bytes(reader.rows["offset"][2]))
    record(BATCH).combine(ALONE).write(tmp_path, CLASSES, reader)
    assert table(tmp_path / WORST)[1][:4] == ["2", "val-000000.tar", str(reader.rows["offset"][2]), ""]


def test_a_folder_without_tables_has_no_details(tmp_path):
    assert read_details(tmp_path, 3) is None


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (CONFUSION, "id0,0,id0,1", "id0,0,id0,many"),
        (CONFUSION, "\n1,id1,2", "\n1,id1,3"),  # there is no class 3
        (CONFUSION, "label", "lable"),
        (CONFUSION, ",id2,1\n", ""),
        (WORST, "id1,2,id2", "id1,-1,id2"),
    ],
)
def test_a_damaged_table_is_named(dataset, tmp_path, name, old, new):
    record(BATCH).combine(ALONE).write(tmp_path, CLASSES, dataset.reader("val"))
    path = tmp_path / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ContentError, match=f"{path} is damaged"):
        read_details(tmp_path, 3)


class Always(nn.Module):
    """A net that is always sure of class 3."""

    def forward(self, pixels):
        return torch.eye(10)[3].repeat(len(pixels), 1)


@pytest.mark.parametrize(("lost", "batch"), [([], 8), ([0, 5, 19], 8), ([0, 5, 19], 3), (range(3, 17), 4)])
def test_details_count_each_image_once_and_leave_out_damaged_ones(packed_copy, lost, batch):
    dataset, damages = Dataset(packed_copy), []
    reader, world = dataset.reader("val"), replace(ALONE, size=1)
    with open(packed_copy / "val-000000.tar", "r+b") as file:
        for number in lost:
            file.seek(reader.rows["offset"][number])
            file.write(b"damage")
    loader = evaluation_loader(dataset, "val", batch, Decoding(crop=64), on_damage=damages.append)
    recorder, tally = Recorder(loader), Tally(10, world.device)
    scores = evaluate(Always(), "fp32", loader, world, Metrics(), recorder, tally)
    details = recorder.combine(world)
    intact = np.delete(np.arange(20), list(lost))
    labels = reader.rows["label"][intact]
    assert len(damages) == len(lost)
    assert details.pairs == {(label, 3): np.count_nonzero(labels == label) for label in set(labels.tolist())}
    wrong = [(int(label), int(sample)) for label, sample in zip(labels, intact, strict=True) if label != 3]
    assert [(image.label, image.sample) for image in details.mistakes] == wrong
    images = np.bincount(labels, minlength=10).tolist()
    assert tally.combine(world) == (images, [count * (label != 3) for label, count in enumerate(images)])
    assert scores.top1_error == len(wrong) / scores.images
    assert scores.images == len(intact)
