"""A thousand classes with 50,995 files, packed from ILSVRC's tars and from class folders, lose nothing."""

from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from pipeline.manifest import read_manifest
from pipeline.reader import ShardReader
from tests.trees import Tree, class_folders, encode, tars

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CLASSES = 1000
VAL = 5  # files of each class; in train, the classes have 41 to 51
SIZE = 32
RNG = np.random.default_rng(2012)
WNIDS = [f"n{number:08d}" for number in RNG.choice(10**8, CLASSES, replace=False)]  # unsorted
DARK, LIGHT = (20, 40, 90), (240, 220, 130)
ODD = {  # outcomes of the files with these numbers modulo 500
    100: ("rejected", "empty"),
    200: ("rejected", "not an image"),
    300: ("rejected", "truncated"),
    400: ("repaired", "not RGB"),
}


def listing() -> Iterator[tuple[str, str, str]]:
    """Yield split, class and name of each file, in the order of their numbers."""
    for label, wnid in enumerate(WNIDS):
        for number in range(41 + label % 11):
            yield "train", wnid, f"{wnid}_{number}.JPEG"
    for number, wnid in enumerate(RNG.permutation(WNIDS * VAL).tolist(), 1):
        yield "val", wnid, f"ILSVRC2012_val_{number:08d}.JPEG"


FILES = list(listing())


def outcome(number: int) -> tuple[str, str]:
    return ODD.get(number % 500, ("packed", ""))


def content(number: int) -> bytes:
    """Return a JPEG that shows its number as 4 × 4 dark and light cells, or one of the odd files."""
    bits = np.unpackbits(np.array([number], ">u2").view(np.uint8)).reshape(4, 4)
    image = Image.fromarray(np.array([DARK, LIGHT], np.uint8)[bits].repeat(10, 0).repeat(10, 1))
    _, reason = outcome(number)
    jpeg = encode(image.convert("L") if reason == "not RGB" else image, quality=50)
    return {"empty": b"", "not an image": b"no image", "truncated": jpeg[:-20]}.get(reason, jpeg)


def shown(jpeg: np.ndarray) -> int:
    """Return the number that a packed picture shows."""
    luma = np.asarray(Image.open(BytesIO(jpeg)).convert("L"))
    assert luma.shape == (SIZE, SIZE)
    centres = luma[SIZE // 8 :: SIZE // 4, SIZE // 8 :: SIZE // 4]
    return int(np.packbits(centres > 128).view(">u2")[0])


@pytest.fixture(scope="module")
def datasets(make_shards, tmp_path_factory) -> list[Path]:
    """The datasets that are packed from the tars and from class folders."""
    tree: Tree = {split: {wnid: {} for wnid in WNIDS} for split in ("train", "val")}
    for number, (split, wnid, name) in reversed([*enumerate(FILES)]):  # so the names of a class are unsorted
        tree[split][wnid][name] = content(number)
    outputs = []
    for form in (tars, class_folders):
        outputs.append(tmp_path_factory.mktemp("dataset"))
        with TemporaryDirectory() as source:  # pytest would keep it for longer
            make_shards(form(tree, Path(source)), outputs[-1], "--size", str(SIZE), "--workers", "2")
    return outputs


def test_tars_and_class_folders_pack_to_the_same_bytes(datasets):
    one, other = ({path.name: path for path in dataset.iterdir()} for dataset in datasets)
    shards = [f"train-{number:06d}" for number in range(46)] + [f"val-{number:06d}" for number in range(5)]
    names = {f"{shard}.{kind}" for shard in shards for kind in ("tar", "idx")}
    arrays = {f"{split}.{kind}.npy" for split in ("train", "val") for kind in ("index", "checksums")}
    assert one.keys() == names | arrays | {"report.tsv", "dataset.json"}
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].read_bytes() != other[name].read_bytes()] == []


def test_labels_are_the_positions_of_the_sorted_classes(datasets):
    assert [each.id for each in read_manifest(datasets[0]).classes] == sorted(WNIDS)


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_picture_is_in_exactly_one_row_with_its_label(datasets, split):
    labels = {wnid: label for label, wnid in enumerate(sorted(WNIDS))}
    usable = {
        (number, labels[wnid])
        for number, (part, wnid, _) in enumerate(FILES)
        if part == split and outcome(number)[0] != "rejected"
    }
    reader = ShardReader(datasets[0], read_manifest(datasets[0]), split)
    numbers = map(shown, reader.jpegs(np.arange(len(reader))))
    found = list(zip(numbers, reader.rows["label"].tolist(), strict=True))
    assert sorted(usable.symmetric_difference(found))[:5] == []
    assert len(found) == len(usable)


def test_repaired_and_rejected_files_are_listed_and_counted(datasets):
    odd = [(number, *outcome(number)) for number in range(len(FILES)) if number % 500 in ODD]
    lines = sorted(f"{'/'.join(FILES[number])}\t{kind}\t{reason}" for number, kind, reason in odd)
    assert (datasets[0] / "report.tsv").read_text().splitlines() == ["file\toutcome\treason", *lines]
    manifest = read_manifest(datasets[0])
    counts = Counter((kind, reason) for _, kind, reason in odd)
    assert manifest.repaired == {reason: n for (kind, reason), n in counts.items() if kind == "repaired"}
    assert manifest.rejected == {reason: n for (kind, reason), n in counts.items() if kind == "rejected"}
