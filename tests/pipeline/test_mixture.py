"""Several datasets are read as one, with the labels of the first, and give the batches that the plan says."""

import shutil
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.colour import mix_pixels
from pipeline.graph import Decoding
from pipeline.loader import Dataset, train_loader
from pipeline.manifest import DatasetError, read_manifest, write_manifest
from pipeline.mixture import change_folders, combine, read_sources, weights_of
from pipeline.packing.statistics import PixelSums
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from pipeline.shards import write_array
from tests.helpers import assert_same_batches, copies
from tests.trees import pack_here

DECODING = Decoding(crop=64)


@pytest.fixture(scope="module")
def other(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation pictures, packed as 20 training images, with the classes in reverse order."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("other")
    for split in ("train", "val"):
        shutil.copytree(pictures / "val", source / split)
    pack_here("--input", source, "--out", output, "--size", "80", "--shard-samples", "9")
    manifest, splits = read_manifest(output), {}
    for name, split in manifest.splits.items():
        rows = np.load(output / split.index)
        rows["label"] = len(manifest.classes) - 1 - rows["label"]
        splits[name] = split.model_copy(update={"index_sha256": write_array(output / split.index, rows)})
    classes = manifest.classes[::-1]
    write_manifest(output, manifest.model_copy(update={"classes": classes, "splits": splits}))
    return output


@pytest.fixture(scope="module")
def mixed(packed: Path, other: Path) -> Dataset:
    return Dataset(Path(f"{packed}=0.75,{other}=0.25"))


def plan_of(dataset: Dataset, balance: float = 0.0) -> Plan:
    shards = dataset.manifest.split("train").shards
    layout = tuple(shard.samples for shard in shards)
    return Plan(seed=7, batch=16, shard_samples=layout, composition=dataset.composition(balance))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("shards", {"shards": 1}),
        ("shards,old", {"shards,old": 1}),
        ("date=2012/shards", {"date=2012/shards": 1}),
        ("a=0.7,b=0.3", {"a": 0.7, "b": 0.3}),
        ("/x/a=7, b=1=3e0", {"/x/a": 7, "b=1": 3}),
    ],
)
def test_datasets_are_named_with_their_weights(data, expected):
    weights = weights_of(Path(data))
    assert weights == {Path(name): weight for name, weight in expected.items()}
    assert weights_of(change_folders(Path(data), lambda folder: folder / "x")) == {
        folder / "x": weight for folder, weight in weights.items()
    }


SIGNED = "https://host/shards?list=a,b&expires=5&sig=Zm9v,YmFy="


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (SIGNED, {SIGNED: 1}),
        ("https://host/shards?expires=5,sig=7", {"https://host/shards?expires=5,sig=7": 1}),
        (f"{SIGNED}=0.7,s3://bucket/x=0.3", {SIGNED: 0.7, "s3://bucket/x": 0.3}),
        (f"shards=.7, {SIGNED}=1e-1", {Path("shards"): 0.7, SIGNED: 0.1}),
        (f"{SIGNED}=1,{SIGNED}x=2,/x/y=3", {SIGNED: 1, f"{SIGNED}x": 2, Path("/x/y"): 3}),
        ("s3://a/b=.7,s3://c/d=.3", {"s3://a/b": 0.7, "s3://c/d": 0.3}),
    ],
)
def test_commas_and_equals_signs_of_a_signature_do_not_make_a_mixture(data, expected):
    assert weights_of(data) == expected
    assert weights_of(change_folders(data, lambda folder: folder)) == expected


def test_messages_about_mixtures_hide_signatures():
    with pytest.raises(DatasetError) as error:
        read_sources(f"{SIGNED}=0,s3://bucket/x=1")
    assert "host" in str(error.value)
    assert "Zm9v" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a=x,b=1", "the weight of a should be a number greater than 0, not x"),
        ("a=0,b=0", "the weight of a should be a number greater than 0, not 0"),
        ("a=1,b=-1", "the weight of b should be a number greater than 0, not -1"),
        ("a=1,b=nan", "the weight of b should be a number greater than 0, not nan"),
        ("a=1,b=inf", "the weight of b should be a number greater than 0, not inf"),
        ("a=1,b=", "the weight of b should be a number greater than 0, not ''"),
        ("a=1,b", "b has no weight: name several datasets as DIR=WEIGHT,DIR=WEIGHT"),
        ("a=1,./a=2", "./a is given twice"),
    ],
)
def test_impossible_weights_are_refused(data, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        weights_of(Path(data))


def test_a_mixture_has_the_files_of_all_datasets_and_the_labels_of_the_first(mixed, packed, other):
    reader, number = mixed.reader("train"), 0
    labels = {entry.id: label for label, entry in enumerate(mixed.manifest.classes)}
    for root in (packed, other):
        own = ShardReader(root, read_manifest(root), "train")
        classes = read_manifest(root).classes
        for sample, label in enumerate(own.rows["label"].tolist()):
            assert reader.jpeg(number) == own.jpeg(sample)
            assert reader.location(number) == own.location(sample)
            assert reader.rows["label"][number] == labels[classes[label].id]
            number += 1
    assert len(reader) == number == mixed.manifest.split("train").samples == 80
    assert mixed.reader("val").split == read_manifest(packed).split("val")


def test_the_pixels_of_a_mixture_are_those_of_all_images(mixed, packed, other):
    parts, sums = [], PixelSums()
    for root, share in ((packed, 0.75), (other, 0.25)):  # of 80 images of one size, as the weights are
        own, reader = PixelSums(), ShardReader(root, read_manifest(root), "train")
        for number in range(len(reader)):
            own.add_image(Image.open(BytesIO(reader.jpeg(number))).convert("RGB"))
        parts.append((share, own.statistics()))
        sums.add(own)
    found, expected = mix_pixels(parts), sums.statistics()
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-4)
    np.testing.assert_allclose(found.eigenvectors, expected.eigenvectors, atol=1e-4)
    parts = [(0.75, read_manifest(packed).pixels), (0.25, read_manifest(other).pixels)]
    assert mixed.manifest.pixels == mix_pixels(parts)


def test_a_mixture_is_identified_by_its_datasets_and_their_shares(packed, other, tmp_path):
    def fingerprint(data: str) -> str:
        return combine(read_sources(Path(data))).fingerprint

    moved = shutil.copytree(other, tmp_path / "moved")
    assert fingerprint(f"{packed}=0.75,{other}=0.25") == fingerprint(f"{packed}=3,{moved}=1")
    different = (f"{packed}=3,{other}=2", f"{other}=1,{packed}=3", str(packed), str(other))
    assert len({fingerprint(data) for data in (*different, f"{packed}=3,{other}=1")}) == 5


def change(root: Path, folder: Path, **fields: object) -> Path:
    """Return a copy of a dataset whose manifest has other fields."""
    shutil.copytree(root, folder)
    write_manifest(folder, read_manifest(root).model_copy(update=fields))
    return folder


def test_datasets_that_cannot_be_mixed_are_refused(packed, other, tmp_path):
    classes = read_manifest(other).classes
    renamed = (classes[0].model_copy(update={"id": "another"}), *classes[1:])
    size = "has geometry 256 at 79 px, but .* has 256 at 80 px: pack them alike$"
    refused = {
        shutil.copytree(packed, tmp_path / "copy"): "is the same dataset as .*: omit one of them$",
        change(
            other, tmp_path / "fewer", classes=classes[1:]
        ): f"different classes: .* has {classes[0].id}, ",
        change(other, tmp_path / "renamed", classes=renamed): "different classes: .* which .*renamed lacks$",
        change(other, tmp_path / "smaller", size=79): size,
        change(other, tmp_path / "whole", geometry="original"): "has geometry original at 80 px",
        tmp_path / "nothing": "no dataset at .*nothing",
    }
    for folder, message in refused.items():
        with pytest.raises(DatasetError, match=message) as refusal:
            Dataset(Path(f"{packed}=1,{folder}=1"))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_all_ranks_together_get_the_batches_of_one_process_also_after_a_restart(
    mixed, packed, other, balance
):
    whole = copies(train_loader(mixed, plan_of(mixed, balance), range(8), DECODING, colour="code2012"))
    for world, start in ((2, 0), (4, 6)):
        again = Dataset(Path(f"{packed}=0.75,{other}=0.25"))
        options = {"colour": "code2012", "world": world}
        ranks = [
            copies(
                train_loader(again, plan_of(again, balance), range(start, 8), DECODING, rank=rank, **options)
            )
            for rank in range(world)
        ]
        together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
        assert_same_batches(together, whole[start:])


def test_a_balanced_epoch_has_equally_many_images_of_each_class(mixed):
    plan = plan_of(mixed, 1.0)
    labels = torch.cat([labels for _, labels in train_loader(mixed, plan, range(10), DECODING)])
    assert torch.bincount(labels[:80]).tolist() == [8] * 10
    from_first = np.concatenate([plan.step_samples(step) for step in range(10)])[:80] < 60
    assert from_first.sum() == 60


def test_damage_in_the_second_dataset_names_its_file(packed, other, tmp_path):
    broken = shutil.copytree(other, tmp_path / "broken")
    dataset = Dataset(Path(f"{packed}=1,{broken}=1"))
    row = dataset.reader("train").rows[60]
    with open(broken / "train-000000.tar", "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(2))
    found: list[str] = []
    loader = train_loader(
        dataset, plan_of(dataset), range(5), DECODING, on_damage=lambda damage: found.append(damage.location)
    )
    assert len(list(chain.from_iterable(labels for _, labels in loader))) == 80
    assert found == [f"{broken / 'train-000000.tar'} at byte {row['offset']}"]
