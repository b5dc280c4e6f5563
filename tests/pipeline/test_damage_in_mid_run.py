"""Shards that are truncated, overwritten, deleted or unreadable while a loader reads them."""

import dataclasses
import errno
import io
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

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
from tests.helpers import assert_same_batches, copies
from tests.trees import pack_here

pytestmark = pytest.mark.usefixtures("_larger_than_memory")

DECODING = Decoding(crop=64)
SHARD = 1  # of three, with samples 20 to 39
LOST = range(20, 40)
STEPS, DAMAGED_AFTER = 15, 3  # five steps per epoch
SURE = 8  # the first step of which nothing was read before the damage


@pytest.fixture
def dataset(packed_copy: Path) -> Dataset:
    dataset = Dataset(packed_copy)
    assert [shard.samples for shard in dataset.reader("train").split.shards] == [20, 20, 20]
    return dataset


def path_of(dataset: Dataset) -> Path:
    return dataset.root / dataset.reader("train").split.shards[SHARD].file


def overwrite(path: Path, content: bytes | None = None) -> None:
    """Overwrite a file in place, by default with zeros; wherever it is open, the change is visible."""
    with open(path, "r+b") as file:
        file.write(content or bytes(path.stat().st_size))


def replace(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b"another file")
    other.rename(path)


def fail_with_eio(path: Path) -> None:
    """Let reads fail with EIO, as the kernel lets reads of the lowest addresses in /proc/self/mem."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(memory, 1, 512)
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.resolve() == path:
            os.dup2(memory, int(descriptor.name))
    os.close(memory)


def claim_another_size(path: Path) -> None:
    """Flip one bit in the height that each JPEG header gives."""
    content = bytearray(path.read_bytes())
    start = content.find(b"\xff\xd8\xff")
    while start >= 0:
        at = start + (size_offset(bytes(content[start : start + 4096])) or 0)
        content[at] ^= 0x80  # 80 rows become 32,848
        start = content.find(b"\xff\xd8\xff", start + 2)
    overwrite(path, content)


def put_junk_in_the_header(path: Path) -> None:
    """Let the first segment of each JPEG end two bytes early, which DALI refuses and Pillow accepts."""
    content = bytearray(path.read_bytes())
    head = b"\xff\xd8\xff\xe0\x00"
    start = content.find(head)
    while start >= 0:
        content[start + len(head)] -= 2
        start = content.find(head, start + 1)
    overwrite(path, content)


def truncate(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated": (truncate, "unreadable", "cannot be read: the shard has become shorter"),
    "I/O error": (fail_with_eio, "unreadable", "cannot be read: Input/output error"),
    "overwritten": (overwrite, "undecodable", "does not begin like a JPEG"),
    "other sizes": (claim_another_size, "undecodable", "claims 80×32848 px, but the index says 80×80"),
}


def plan_of(dataset: Dataset) -> Plan:
    return Plan(seed=7, batch=12, shard_samples=(20, 20, 20))


def train(dataset: Dataset, damage: Callable[[Path], None] | None = None, **options) -> list[Batch]:
    """Return the batches of three epochs; a shard is damaged during the first."""
    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, colour="paper", **options)
    batches = list(islice(loader, DAMAGED_AFTER))
    if damage is not None:
        damage(path_of(dataset))
    return copies([*batches, *loader])


@pytest.mark.parametrize(("damage", "reason", "what"), DAMAGES.values(), ids=DAMAGES)
def test_each_lost_sample_is_reported_once_and_replaced_by_the_next_one(
    packed, dataset, damage, reason, what, monkeypatch
):
    damages: list[Damage] = []
    ours = train(dataset, damage, on_damage=damages.append)
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
    assert_same_batches(ours[SURE:], expected[SURE:])


def test_a_picture_that_only_the_decoder_refuses_is_left_out(dataset):
    damages: list[Damage] = []
    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, on_damage=damages.append)
    batches = list(islice(loader, 5))  # an epoch, in which all samples are read and look sound
    put_junk_in_the_header(path_of(dataset))
    assert sum(len(labels) for _, labels in [*batches, *loader]) == STEPS * 12
    reader = dataset.reader("train")
    assert sorted(damage.location for damage in damages) == sorted(map(reader.location, LOST))
    assert {(damage.reason, damage.what) for damage in damages} == {("undecodable", "cannot be decoded")}
    Image.open(io.BytesIO(reader.jpeg(LOST.start))).load()  # Pillow does not refuse it


@pytest.mark.slow
def test_a_decoder_without_memory_does_not_make_intact_pictures_damaged(tmp_path):
    """DALI's message is the same as for a damaged file.

    The limit leaves the process room for its threads, but less than DALI needs for a picture, 700 to 800 MiB.
    """
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        Image.new("RGB", (10_000, 10_000), "green").save(tmp_path / split / "class" / "large.jpg")
    pack_here("--input", tmp_path, "--out", tmp_path / "shards", "--geometry", "original")
    script = """
import resource, sys
from pipeline import Loader, open_dataset

dataset = open_dataset(sys.argv[1])
with Loader(dataset, 1, crop=64, device="cpu", threads=1, on_damage=print) as loader:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 600 * 2**20,) * 2)
    next(iter(loader.epoch(0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "shards"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "DecodingMemoryError: DALI cannot decode a batch of intact images" in done.stderr


def test_without_memory_to_look_for_the_damaged_no_picture_counts_as_damaged(dataset, monkeypatch):
    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, on_damage=pytest.fail)
    list(islice(loader, 5))  # an epoch, in which all samples are read and look sound
    put_junk_in_the_header(path_of(dataset))
    monkeypatch.setattr(Image, "new", Mock(side_effect=MemoryError))
    with pytest.raises(DatasetError, match="cannot decode a batch of intact images, probably because memory"):
        list(loader)


@pytest.mark.parametrize("damage", [Path.unlink, replace])
def test_a_deleted_or_replaced_shard_can_still_be_read(packed, dataset, damage):
    assert_same_batches(train(dataset, damage), train(Dataset(packed)))
    assert not path_of(dataset).is_file() or path_of(dataset).read_bytes() == b"another file"


def test_only_samples_that_a_truncation_reaches_are_lost(dataset):
    reader = dataset.reader("train")
    row = reader.rows[30]
    os.truncate(path_of(dataset), int(row["offset"] + row["size"]) - 1)
    files = reader.read(np.array([29, 30, 31]))
    assert list(files.failures) == [1, 2]
    assert bytes(files.jpegs[0]).endswith(b"\xff\xd9")


def test_short_reads_are_completed(packed, monkeypatch):
    def read() -> list[bytes]:
        reader = Dataset(packed).reader("train")
        return list(map(bytes, reader.jpegs(np.arange(60))))

    whole, pread, preadv = read(), os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    monkeypatch.setattr(os, "preadv", lambda file, rooms, offset: preadv(file, [rooms[0][:1000]], offset))
    assert read() == whole


def test_an_exceeded_budget_of_damage_ends_the_loader_after_earlier_batches(dataset):
    left_out: list[Damage] = []

    def on_damage(damage: Damage) -> None:
        left_out.append(damage)
        if len(left_out) > 5:
            raise DatasetError(f"enough: {damage}")

    loader = train_loader(dataset, plan_of(dataset), range(STEPS), DECODING, on_damage=on_damage)
    batches = list(islice(loader, DAMAGED_AFTER))
    truncate(path_of(dataset))
    with pytest.raises(DatasetError, match=f"enough: the sample in {path_of(dataset)} at byte"):
        batches.extend(loader)
    assert DAMAGED_AFTER <= len(batches) < SURE
    assert len(left_out) == 6


def test_a_damaged_sample_is_missing_from_an_evaluation(dataset):
    damages: list[Damage] = []
    loader = evaluation_loader(dataset, "train", 12, DECODING, on_damage=damages.append)
    fail_with_eio(path_of(dataset))
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == np.delete(dataset.reader("train").rows["label"], LOST).tolist()
    assert len(damages) == len(LOST)


def test_a_restored_sample_is_in_the_next_evaluation(dataset):
    damages: list[Damage] = []
    loader = evaluation_loader(dataset, "train", 12, DECODING, on_damage=damages.append, persistent=True)
    seen = []
    for _ in range(3):
        claim_another_size(path_of(dataset))  # or the right size again
        seen.append(sum(len(labels) for _, labels in loader))
    assert seen == [40, 60, 40]
    assert len(damages) == 2 * len(LOST)


def test_reading_one_sample_names_it_if_it_cannot_be_read(dataset):
    truncate(path_of(dataset))
    reader = dataset.reader("train")
    with pytest.raises(DatasetError, match=f"{path_of(dataset)} at byte .* cannot be read: .* shorter: copy"):
        reader.jpeg(20)
    with pytest.raises(DatasetError, match=r"the tar header before .* shorter: copy"):
        reader.key(20)


def test_a_batch_for_dali_keeps_its_bytes_alive(packed):
    """The loader keeps the batch until DALI no longer needs it."""
    files = Dataset(packed).reader("train").read(np.array([5, 6]))
    buffer, batch = weakref.ref(files.buffer), jpeg_batch(files.jpegs)
    del files
    assert buffer() is not None
    del batch
    assert buffer() is None


def test_deleting_a_reader_closes_its_files(packed_copy):
    def open_files() -> int:
        """Return the number of open files of the copy, which no other test uses."""
        return sum(packed_copy in file.resolve().parents for file in Path("/proc/self/fd").iterdir())

    reader = Dataset(packed_copy).reader("train")
    assert open_files() == len(reader.split.shards) == 3
    del reader
    assert open_files() == 0


def test_a_jpeg_without_a_size_is_left_out(dataset):
    path, reader = path_of(dataset), dataset.reader("train")
    start = int(reader.rows["offset"][25])
    with open(path, "r+b") as file:
        file.seek(start + 2)
        file.write(b"\xff\xda")  # a scan before any frame
    damages: list[Damage] = []
    samples, files = CheckedReader(reader, damages.append, replace=False).read(np.array([24, 25, 26]))
    assert samples.tolist() == [24, 26]
    assert len(files.jpegs) == 2
    [damage] = damages
    assert str(damage) == f"the sample in {path} at byte {start} does not give the size of its image"
