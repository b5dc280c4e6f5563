"""The real command packs drawn pictures, with some odd files among them, and repeats its bytes."""

import tarfile
from collections import Counter
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.manifest import Manifest, read_manifest
from pipeline.packing.options import PackingOptions
from pipeline.packing.planning import plan_tasks
from pipeline.packing.sources.find import SourceImage, Sources
from pipeline.shards import read_checksums
from tests.trees import contents
from tools.draw_pictures import class_names, draw

SIZE = 48
CLASSES = sorted(class_names())  # labels are positions in this order
SETTINGS = ("--size", str(SIZE), "--shard-samples", "16", "--max-reject-ratio", "0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ten classes of 4 + 2 pictures; train also has a wide gray picture, a PNG, and four unusable files."""
    root = tmp_path_factory.mktemp("source")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(class_names()):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng((count, label, number))
                draw(name, rng).save(root / split / name / f"{number}.JPEG", quality=90)
    wide = draw("warm_disc", np.random.default_rng(1)).resize((192, 96)).convert("L")
    wide.save(root / "train/warm_disc/wide.JPEG")
    draw("cold_ring", np.random.default_rng(2)).save(root / "train/cold_ring/a picture.png")
    (root / "train/warm_disc/empty.JPEG").touch()
    (root / "train/cold_ring/text.JPEG").write_text("no image")
    (root / "train/cold_ring/gone.JPEG").symlink_to(root / "nowhere")
    (root / "train/notes.txt").write_text("a stray")
    return root


REJECTED = {
    "train/notes.txt": "in no class",
    "train/warm_disc/empty.JPEG": "empty",
    "train/cold_ring/text.JPEG": "not an image",
    "train/cold_ring/gone.JPEG": "unreadable",
}
REPAIRED = {"train/warm_disc/wide.JPEG": "not RGB", "train/cold_ring/a picture.png": "not a JPEG"}


@pytest.fixture(scope="module")
def dataset(source, make_shards, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dataset")
    make_shards(source, output, *SETTINGS)
    return output


def usable(source: Path, split: str) -> list[Path]:
    files = sorted((source / split).glob("*/*"))
    return [path for path in files if str(path.relative_to(source)) not in REJECTED]


def as_packed(path: Path) -> np.ndarray:
    """Return the pixels that section 2 of the paper makes of a file, by Pillow alone."""
    image = Image.open(path).convert("RGB")
    scale = SIZE / min(image.size)  # sizes are multiples of it, so nothing is rounded
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), float)


def members(dataset: Path, manifest: Manifest, split: str) -> list[list[tuple[tarfile.TarInfo, bytes]]]:
    """Return what Python's tarfile reads from each shard of a split."""
    result = []
    for shard in manifest.split(split).shards:
        with tarfile.open(dataset / shard.file) as tar:
            result.append([(member, tar.extractfile(member).read()) for member in tar])
    return result


def test_more_workers_and_another_folder_give_the_same_bytes(source, dataset, make_shards, tmp_path):
    make_shards(source, tmp_path / "again", *SETTINGS, "--workers", "2")
    first, second = contents(dataset), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert {
        "dataset.json",
        "report.tsv",
        "train.index.npy",
        "val.checksums.npy",
        "train-000002.tar",
    } <= first.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_each_split_has_the_checksums_of_its_samples_in_the_order_of_the_index(dataset):
    manifest = read_manifest(dataset)
    for split in manifest.splits:
        files = chain.from_iterable(members(dataset, manifest, split))
        jpegs = [content for member, content in files if member.name.endswith(".jpg")]
        stored = np.load(dataset / f"{split}.checksums.npy")
        assert stored.tobytes() == b"".join(sha256(jpeg).digest()[:8] for jpeg in jpegs)
        np.testing.assert_array_equal(stored, read_checksums(dataset, manifest.split(split)))


def test_every_file_is_packed_or_reported(source, dataset):
    manifest = read_manifest(dataset)
    header, *lines = (dataset / "report.tsv").read_text().splitlines()
    assert header == "file\toutcome\treason"
    events = [(path, "rejected", reason) for path, reason in REJECTED.items()]
    events += [(path, "repaired", reason) for path, reason in REPAIRED.items()]
    assert sorted(tuple(line.split("\t")) for line in lines) == sorted(events)
    assert manifest.rejected == Counter(REJECTED.values())
    assert manifest.repaired == Counter(REPAIRED.values())
    for split in ("train", "val"):
        assert manifest.split(split).samples == len(usable(source, split))


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_picture_is_in_the_shards_once_with_its_label(source, dataset, split):
    files = usable(source, split)
    pixels = np.stack([as_packed(path) for path in files])
    labels = [CLASSES.index(path.parent.name) for path in files]
    found = []
    for shard in members(dataset, read_manifest(dataset), split):
        for (_, jpeg), (_, text) in zip(shard[::2], shard[1::2], strict=True):
            shown = np.asarray(Image.open(BytesIO(jpeg)), float)
            distance = np.abs(pixels - shown).mean((1, 2, 3))
            found.append(int(distance.argmin()))
            assert distance.min() < 6  # the loss by JPEG at quality 90 in such pictures
            assert text == str(labels[found[-1]]).encode()
    assert sorted(found) == list(range(len(files)))
    assert found != sorted(found)  # shuffled


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_index_agrees_with_the_tars(dataset, split):
    manifest = read_manifest(dataset)
    record, expected, keys = manifest.split(split), [], []
    for number, shard in enumerate(members(dataset, manifest, split)):
        lines = []
        for (image, jpeg), (label, text) in zip(shard[::2], shard[1::2], strict=True):
            expected.append(
                (number, image.offset_data, len(jpeg), int(text), *Image.open(BytesIO(jpeg)).size)
            )
            key = image.name.removesuffix(".jpg")
            assert (image.name, label.name) == (f"{key}.jpg", f"{key}.cls")
            keys.append(key)
            parts = (f"{each.offset_data} {each.size} {each.name}" for each in (image, label))
            lines.append("jpg {} cls {}".format(*parts))
        content = (dataset / record.shards[number].file).read_bytes()
        assert record.shards[number].samples == len(lines) <= 16
        assert record.shards[number].bytes == len(content)
        assert record.shards[number].sha256 == sha256(content).hexdigest()
        index = (dataset / record.shards[number].file).with_suffix(".idx").read_text().splitlines()
        assert index == [f"v1.2 {len(lines)}", *lines]  # DALI's format, version 1.2
    rows = np.load(dataset / record.index)
    assert rows.dtype.names == ("shard", "offset", "size", "label", "width", "height")
    assert rows.tolist() == expected
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys)


def test_the_mean_and_components_are_those_of_the_training_pixels(source, dataset):
    pixels = np.concatenate([as_packed(path).reshape(-1, 3) for path in usable(source, "train")])
    statistics = read_manifest(dataset).pixels
    values, vectors = np.array(statistics.eigenvalues), np.array(statistics.eigenvectors)
    np.testing.assert_allclose(statistics.mean, pixels.mean(0), atol=1e-5)
    np.testing.assert_allclose(vectors * values @ vectors.T, np.cov(pixels.T, bias=True), atol=0.1)


def test_the_manifest_describes_what_was_packed(dataset):
    manifest = read_manifest(dataset)
    assert [each.id for each in manifest.classes] == [each.name for each in manifest.classes] == CLASSES
    assert (manifest.geometry, manifest.size) == ("256", SIZE)
    assert (manifest.max_width, manifest.max_height) == (SIZE, SIZE)
    assert manifest.packed["quality"] == 90
    assert manifest.packed["pillow"] == Image.__version__


def test_the_manifest_is_written_last(dataset):
    times = {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()}
    assert times["dataset.json"] == max(times.values())


def planned(seed: int, count: int, limit: int) -> list[list[str]]:
    files = [SourceImage(f"train/a/{number}", 0, f"/in/train/a/{number}") for number in range(count)]
    options = PackingOptions("i", "o", seed=seed, shard_samples=limit)
    tasks = plan_tasks(options, Sources(["a"], {"train": files, "val": files}, []))
    firsts = np.cumsum([0, *(len(task.sources) for task in tasks["train"])])
    assert [task.first_key for task in tasks["train"]] == firsts[:-1].tolist()
    return [[source.path for source in task.sources] for split in tasks.values() for task in split]


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (7, 3), (100, 10), (101, 10), (5, 1000)])
def test_shards_are_equal_parts_of_a_seeded_order(count, limit):
    shards = planned(3, count, limit)
    half = len(shards) // 2
    assert half == -(-count // limit)  # rounded up
    for split in (shards[:half], shards[half:]):
        sizes = [len(shard) for shard in split]
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1
        assert sorted(path for shard in split for path in shard) == sorted(
            f"train/a/{n}" for n in range(count)
        )
    assert planned(3, count, limit) == shards
    if count >= 100:
        assert planned(4, count, limit) != shards
        assert shards[:half] != shards[half:]  # another order for val
