"""Shards that are cut, written over, lost or unreadable while a loader reads them."""

import dataclasses
import errno
import io
import os
import shutil
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checked import CheckedReader, Damage
from pipeline.graph import jpeg_batch
from pipeline.jpeg import size_offset
from pipeline.loader import Batch, Dataset, Decoding, evaluation_loader, train_loader
from pipeline.manifest import DatasetError
from pipeline.plan import Plan

pytestmark = pytest.mark.usefixtures("_larger_than_memory")

DECODING = Decoding(crop=64)
SHARD = 1  # of three, with samples 20 to 39
LOST = range(20, 40)
STEPS, HARMED_AFTER, SURE = 15, 3, 8  # five steps an epoch; from SURE on nothing is from before the harm


@pytest.fixture
def dataset(packed: Path, tmp_path: Path) -> Dataset:
    """A copy to damage once it is open."""
    dataset = Dataset(Path(shutil.copytree(packed, tmp_path / "data")))
    assert [shard.samples for shard in dataset.reader("train").split.shards] == [20, 20, 20]
    return dataset


def path_of(dataset: Dataset) -> Path:
    return dataset.root / dataset.reader("train").split.shards[SHARD].file


def write_over(path: Path) -> None:
    """In place: whoever has the file open sees it."""
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b"another file")
    other.rename(path)


def fail_with_eio(path: Path) -> None:
    """The kernel refuses to read the lowest addresses of a process, through its `mem`, with EIO."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(memory, 1, 512)
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.resolve() == path:
            os.dup2(memory, int(descriptor.name))
    os.close(memory)


def claim_another_size(path: Path) -> None:
    """As a flipped bit might: the headers of all pictures."""
    content = bytearray(path.read_bytes())
    place = content.find(b"\xff\xd8\xff")
    while place >= 0:
        at = place + (size_offset(bytes(content[place : place + 4096])) or 0)
        content[at] ^= 0x80  # 80 rows become 32,848
        place = content.find(b"\xff\xd8\xff", place + 2)
    with open(path, "r+b") as file:
        file.write(content)


def put_junk_in_the_header(path: Path) -> None:
    """In all pictures the first segment ends two bytes early: DALI refuses it and Pillow does not."""
    content = bytearray(path.read_bytes())
    head = b"\xff\xd8\xff\xe0\x00"
    place = content.find(head)
    while place >= 0:
        content[place + len(head)] -= 2
        place = content.find(head, place + 1)
    with open(path, "r+b") as file:
        file.write(content)


HARMS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "cut short": (
        lambda path: os.truncate(path, 0),
        "unreadable",
        "cannot be read: the shard has become shorter",
    ),
    "an I/O error": (fail_with_eio, "unreadable", "cannot be read: Input/output error"),
    "written over": (write_over, "undecodable", "does not begin like a JPEG"),
    "other sizes": (claim_another_size, "undecodable", "claims 80×32848 px, but the index says 80×80"),
}


def plan_of(dataset: Dataset) -> Plan:
    return Plan(seed=7, batch=12, shard_samples=(20, 20, 20))


def train(dataset: Dataset, harm: Callable[[Path], None] | None = None, **options) -> list[Batch]:
    """Three epochs, in the first of which something happens to a shard."""
    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, colour="paper", **options)
    batches = list(islice(loader, HARMED_AFTER))
    if harm is not None:
        harm(path_of(dataset))
    return [(pixels.clone(), labels.clone()) for pixels, labels in [*batches, *loader]]


@pytest.mark.parametrize("name", HARMS)
def test_each_lost_sample_is_named_once_with_its_cause_and_the_next_one_trains(
    packed, dataset, name, monkeypatch
):
    harm, reason, what = HARMS[name]
    damages: list[Damage] = []
    ours = train(dataset, harm, on_damage=damages.append)
    reader = dataset.reader("train")
    assert sorted(damage.location for damage in damages) == sorted(map(reader.location, LOST))
    assert {(damage.reason, damage.what) for damage in damages} == {(reason, what)}

    step_batch = Plan.step_batch

    def without_the_shard(plan: Plan, *where: int):
        part = step_batch(plan, *where)
        lost = np.isin(part.samples, LOST)
        return dataclasses.replace(part, samples=np.where(lost, LOST.stop, part.samples))

    monkeypatch.setattr(Plan, "step_batch", without_the_shard)
    expected = train(Dataset(packed))
    assert len(ours) == len(expected) == STEPS
    for (pixels, labels), (right_pixels, right_labels) in zip(ours[SURE:], expected[SURE:], strict=True):
        assert torch.equal(pixels, right_pixels)
        assert torch.equal(labels, right_labels)


def test_what_the_decoder_alone_refuses_is_found_by_the_decoder(dataset):
    damages: list[Damage] = []
    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, on_damage=damages.append)
    batches = list(islice(loader, 5))  # an epoch, after which all have been read once and looked sound
    put_junk_in_the_header(path_of(dataset))
    assert sum(len(labels) for _, labels in [*batches, *loader]) == STEPS * 12
    reader = dataset.reader("train")
    assert sorted(damage.location for damage in damages) == sorted(map(reader.location, LOST))
    assert {(damage.reason, damage.what) for damage in damages} == {("undecodable", "cannot be decoded")}
    Image.open(io.BytesIO(reader.jpeg(LOST.start))).load()  # Pillow does not refuse it


@pytest.mark.parametrize("harm", [Path.unlink, replace])
def test_a_shard_that_is_deleted_or_has_another_in_its_place_is_read_on(packed, dataset, harm):
    ours, expected = train(dataset, harm), train(Dataset(packed))
    for (pixels, labels), (right_pixels, right_labels) in zip(ours, expected, strict=True):
        assert torch.equal(pixels, right_pixels)
        assert torch.equal(labels, right_labels)
    assert not path_of(dataset).is_file() or path_of(dataset).read_bytes() == b"another file"


def test_a_sample_cut_in_the_middle_is_lost_and_the_one_before_it_is_not(dataset):
    reader = dataset.reader("train")
    row = reader.rows[30]
    os.truncate(path_of(dataset), int(row["offset"] + row["size"]) - 1)
    files = reader.read(np.array([29, 30, 31]))
    assert list(files.failures) == [1, 2]
    assert bytes(files.jpegs[0]).endswith(b"\xff\xd9")


def test_reads_that_bring_little_at_a_time_bring_it_all(packed, monkeypatch):
    reader, preadv = Dataset(packed).reader("train"), os.preadv
    numbers = np.arange(len(reader))
    whole = list(map(bytes, reader.jpegs(numbers)))
    monkeypatch.setattr(os, "preadv", lambda file, rooms, offset: preadv(file, [rooms[0][:1000]], offset))
    assert list(map(bytes, reader.jpegs(numbers))) == whole


def test_beyond_the_budget_the_loader_ends_after_the_batches_before(dataset):
    left_out: list[Damage] = []

    def on_damage(damage: Damage) -> None:
        left_out.append(damage)
        if len(left_out) > 5:
            raise DatasetError(f"enough: {damage}")

    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, on_damage=on_damage)
    batches = list(islice(loader, HARMED_AFTER))
    os.truncate(path_of(dataset), 0)
    with pytest.raises(DatasetError, match=f"enough: the sample in {path_of(dataset)} at byte"):
        batches.extend(loader)
    assert HARMED_AFTER <= len(batches) < SURE
    assert len(left_out) == 6


def test_a_damaged_sample_is_missing_from_an_evaluation(dataset):
    damages: list[Damage] = []
    loader = evaluation_loader(dataset, "train", 12, DECODING, on_damage=damages.append)
    fail_with_eio(path_of(dataset))
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == np.delete(dataset.reader("train").rows["label"], LOST).tolist()
    assert len(damages) == len(LOST)


def test_what_is_whole_again_is_in_the_next_evaluation(dataset):
    damages: list[Damage] = []
    loader = evaluation_loader(dataset, "train", 12, DECODING, on_damage=damages.append, persistent=True)
    seen = []
    for _ in range(3):
        claim_another_size(path_of(dataset))  # and back
        seen.append(sum(len(labels) for _, labels in loader))
    assert seen == [40, 60, 40]
    assert len(damages) == 2 * len(LOST)


def test_tools_are_told_which_sample_cannot_be_read(dataset):
    os.truncate(path_of(dataset), 0)
    reader = dataset.reader("train")
    with pytest.raises(DatasetError, match=f"{path_of(dataset)} at byte .* cannot be read: .* shorter: copy"):
        reader.jpeg(20)
    with pytest.raises(DatasetError, match=r"the tar header before .* shorter: copy"):
        reader.key(20)


def test_a_batch_for_dali_keeps_the_bytes_that_it_points_to(packed):
    """The loader keeps the batch until DALI is done with it."""
    files = Dataset(packed).reader("train").read(np.array([5, 6]))
    buffer, batch = weakref.ref(files.buffer), jpeg_batch(files.jpegs)
    del files
    assert buffer() is not None
    del batch
    assert buffer() is None


def test_a_readers_files_are_closed_with_it(packed, tmp_path):
    root = Path(shutil.copytree(packed, tmp_path / "data"))

    def open_files() -> int:
        """Of this folder, which no other test has open."""
        return sum(root in file.resolve().parents for file in Path("/proc/self/fd").iterdir())

    reader = Dataset(root).reader("train")
    assert open_files() == len(reader.split.shards) == 3
    del reader
    assert open_files() == 0


def test_a_picture_without_a_size_is_left_out(dataset):
    path, reader = path_of(dataset), dataset.reader("train")
    place = int(reader.rows["offset"][25])
    with open(path, "r+b") as file:
        file.seek(place + 2)
        file.write(b"\xff\xda")  # a scan before any frame
    damages: list[Damage] = []
    samples, files = CheckedReader(reader, damages.append, replace=False).read(np.array([24, 25, 26]))
    assert samples.tolist() == [24, 26]
    assert len(files.jpegs) == 2
    [damage] = damages
    assert str(damage) == f"the sample in {path} at byte {place} does not give the size of its image"
