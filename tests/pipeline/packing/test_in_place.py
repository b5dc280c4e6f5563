"""Tars that somebody else packed are indexed by `make_shards.py --in-place`, and can then be read."""

import json
import os
import shutil
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from webdataset import ShardWriter

from pipeline.loader import Dataset
from pipeline.manifest import MANIFEST_NAME, DatasetError, read_manifest
from pipeline.packing import pack as pack_module
from pipeline.packing import resume
from pipeline.packing.progress import Progress
from pipeline.packing.shard import DECODE_EVERY
from pipeline.packing.sources.find import SourceError
from pipeline.shards import read_checksums
from tests.trees import contents, encode, pack_here
from tools import inspect_shards
from tools.make_shards import parse_arguments
from tools.verify_shards import repair, verify

KEPT = {"gray": {}, "progressive": {"progressive": True}, "with metadata": {"comment": b"a comment"}}
LEFT_OUT = ("not a JPEG", "rotated", "truncated", "not plain")


def kept(image: Image.Image) -> list[bytes]:
    """Return files that are kept, although packing with `original` would encode them again."""
    return [encode(image.convert("L") if name == "gray" else image, **how) for name, how in KEPT.items()]


def left_out(image: Image.Image) -> list[bytes]:
    """Return a file for each reason of LEFT_OUT."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encode(image)
    return [encode(image, "PNG"), encode(image, exif=exif), good[:-100], good[:20] + b"junk!" + good[20:]]


def write(folder: Path, name: str, files: list[tuple[bytes, int]], limit: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / f"{name}-%04d.tar"), maxcount=limit, verbose=0) as writer:
        for number, (content, label) in enumerate(files):
            key = f"n{label:08d}_{number}"
            writer.write({"__key__": key, "jpg": content, "cls": label, "json": {"label": label}})


def labelled(split: Path) -> list[tuple[bytes, int]]:
    classes = sorted(split.iterdir())
    files = [(file.read_bytes(), label) for label, of in enumerate(classes) for file in sorted(of.iterdir())]
    return [files[number] for number in np.random.default_rng(1).permutation(len(files))]


@pytest.fixture(scope="module")
def foreign(pictures, tmp_path_factory) -> Path:
    """The drawn pictures and files of every kind, in tars named as at Hugging Face."""
    folder = tmp_path_factory.mktemp("foreign")
    train, val = (labelled(pictures / split) for split in ("train", "val"))
    image = Image.open(BytesIO(train[0][0]))
    odd = [(content, 3) for content in [*kept(image), *left_out(image)]]
    write(folder, "imagenet1k-train", train[:50] + odd + train[50:], 20)
    write(folder, "imagenet1k-validation", val, 20)
    return folder


IN_PLACE = ("--in-place", "--size", "80")


def run(folder: Path, *arguments: str) -> Progress:
    progress = Progress()
    pack_here("--input", folder, *IN_PLACE, *arguments, progress=progress)
    return progress


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.tar")}


def interrupt(owner: object, function: str, *arguments: object) -> None:
    """Pack with `pack_here`, interrupted where it calls a function."""
    with patch.object(owner, function, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pack_here(*arguments)


@pytest.fixture
def indexed(foreign, tmp_path) -> Path:
    folder = Path(shutil.copytree(foreign, tmp_path / "indexed"))
    run(folder)
    return folder


def test_the_tars_stay_unchanged_and_only_the_index_is_added(foreign, indexed):
    assert tars(indexed) == tars(foreign)
    added = {path.name for path in indexed.iterdir()} - tars(foreign).keys()
    arrays = {f"{split}.{kind}.npy" for split in ("train", "val") for kind in ("index", "checksums")}
    assert added == {MANIFEST_NAME, "report.tsv", *arrays}


def test_the_checksums_are_those_of_the_bytes_in_the_tars(indexed):
    split = read_manifest(indexed).split("train")
    for row, checksum in zip(np.load(indexed / split.index), read_checksums(indexed, split), strict=True):
        tar = (indexed / split.shards[row["shard"]].file).read_bytes()
        jpeg = tar[row["offset"] : row["offset"] + row["size"]]
        assert checksum.tobytes() == sha256(jpeg).digest()[:8]


def test_each_sound_image_is_read_with_its_label(pictures, indexed):
    dataset = Dataset(indexed)
    for split, odd in (("train", len(KEPT)), ("val", 0)):
        reader = dataset.reader(split)
        found = [
            (reader.jpeg(number).tobytes(), reader.rows["label"][number]) for number in range(len(reader))
        ]
        wanted = labelled(pictures / split)
        assert len(found) == len(wanted) + odd
        assert set(wanted) <= set(found)
        for number, (content, label) in enumerate(found):
            assert Image.open(BytesIO(content)).size == tuple(reader.rows[["width", "height"]][number])
            assert reader.key(number).startswith(f"n{label:08d}_")
    assert [entry.id for entry in dataset.manifest.classes] == [str(label) for label in range(10)]


def test_unsuitable_images_are_left_out_and_listed(indexed):
    _, *rows = (indexed / "report.tsv").read_text().splitlines()
    assert sorted(row.split("\t")[2] for row in rows) == sorted(LEFT_OUT)
    assert all(row.startswith("imagenet1k-train-000") and "\trejected\t" in row for row in rows)
    assert read_manifest(indexed).rejected == dict.fromkeys(sorted(LEFT_OUT), 1)


def test_mean_and_components_are_those_of_packing_the_same_images(foreign, indexed, tmp_path):
    settings = ("--geometry", "original", "--size", "80")
    packed = pack_here("--input", foreign, "--out", tmp_path / "new", *settings)
    ours = read_manifest(indexed)
    # Packing repairs some of the 60 images that indexing in place must leave out.
    np.testing.assert_allclose(ours.pixels.mean, packed.pixels.mean, atol=4)
    assert ours.splits["val"].samples == packed.splits["val"].samples


def images(sizes: list[tuple[int, int]]) -> list[tuple[bytes, int]]:
    rng = np.random.default_rng(2)
    pixels = (rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in sizes)
    return [(encode(Image.fromarray(image)), label % 2) for label, image in enumerate(pixels)]


@pytest.mark.parametrize(
    ("sizes", "geometry"),
    [
        ([(80, 80)] * 4, "256"),
        ([(80, 80), (80, 120), (100, 80), (80, 80)], "short256"),
        ([(80, 80), (80, 120), (100, 90), (80, 80)], "original"),
        ([(64, 64)] * 4, "original"),
    ],
)
def test_the_geometry_is_the_one_that_all_images_have(sizes, geometry, tmp_path):
    write(tmp_path / "train", "some", images(sizes), 2)
    write(tmp_path / "val", "some", images(sizes), 2)
    run(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest.geometry, manifest.size) == (geometry, 80)
    assert [shard.file for shard in manifest.splits["val"].shards] == [
        "val/some-0000.tar",
        "val/some-0001.tar",
    ]
    assert verify(tmp_path, "all", 1).count == 0


def test_checking_only_headers_gives_the_same_index(indexed):
    whole, rows = read_manifest(indexed), np.load(indexed / "train.index.npy")
    run(indexed, "--overwrite", "--check", "headers")
    manifest = read_manifest(indexed)
    assert manifest.rejected == whole.rejected
    np.testing.assert_array_equal(np.load(indexed / "train.index.npy"), rows)
    assert len(rows) < DECODE_EVERY * 4  # so not all samples of the four tars were decoded
    assert manifest.pixels != whole.pixels
    assert manifest.packed["check"] == "headers"


def test_an_interrupted_run_continues(indexed):
    whole = contents(indexed)
    interrupt(pack_module, "write_dataset", *IN_PLACE, "--input", indexed, "--overwrite")
    assert not (indexed / MANIFEST_NAME).exists()
    progress = run(indexed)
    assert (progress.before, progress.counts.images) == (progress.total, 0)
    assert contents(indexed) == whole


def test_an_interrupted_run_does_not_continue_with_a_changed_tar(indexed, tmp_path):
    interrupt(pack_module, "write_dataset", *IN_PLACE, "--input", indexed, "--overwrite")
    tar = indexed / "imagenet1k-train-0001.tar"
    write(tmp_path, "new", images([(90, 90)] * 3), 3)
    shutil.copy(tmp_path / "new-0000.tar", tar)
    with pytest.raises(SourceError, match="differs from it in the files found"):
        run(indexed)


@pytest.mark.parametrize(
    "stopped_at", [None, "nothing", (pack_module, "write_dataset"), (resume, "_remove_records")]
)
def test_packing_never_replaces_tars_that_it_did_not_write(stopped_at, foreign, pictures, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number, tar in enumerate(sorted(foreign.glob("*.tar"))):  # with the names that packing gives
        split = "train" if "train" in tar.name else "val"
        shutil.copy(tar, folder / f"{split}-{number:06d}.tar")
    before = tars(folder)
    if stopped_at:
        run(folder)
    if stopped_at and stopped_at != "nothing":
        interrupt(*stopped_at, *IN_PLACE, "--input", folder, "--overwrite")
    for overwrite in ((), ("--overwrite",)):
        with pytest.raises(SourceError, match=r"contains train-000000.tar, which this packer did not write"):
            pack_here("--input", pictures, "--out", folder, *overwrite)
    assert tars(folder) == before


def test_damage_is_named_with_the_shard_and_the_member(indexed):
    reader = Dataset(indexed).reader("train")
    row = reader.rows[30]
    tar = indexed / reader.split.shards[row["shard"]].file
    key, start = reader.key(30), int(row["offset"])
    content = bytearray(tar.read_bytes())
    content[start : start + 4] = b"none"
    tar.write_bytes(content)
    (indexed / reader.split.shards[0].file).unlink()
    problems = [str(problem) for problem in verify(indexed, "sampled", 1).problems]
    assert problems == [
        "imagenet1k-train-0000.tar: is missing",
        f"{tar.name}, {key}.jpg, byte {start}: is not a JPEG",
        f"{tar.name}: its sha256 differs from the one in dataset.json",
    ]


def test_a_lost_index_is_made_again_by_the_same_command(indexed):
    (indexed / "train.index.npy").unlink()
    assert [problem.file for problem in verify(indexed, "none", 1).problems] == ["train.index.npy"]
    with pytest.raises(DatasetError, match=f"make-shards --input {indexed} --in-place --overwrite"):
        repair(indexed, 1)
    run(indexed, "--overwrite")
    assert verify(indexed, "none", 1).count == 0


def test_shard_names_outside_the_folder_are_refused(indexed):
    content = json.loads((indexed / MANIFEST_NAME).read_text())
    for name in ("../other.tar", "/other.tar", "a/../../other.tar", "./x.tar"):
        content["splits"]["val"]["shards"][0]["file"] = name
        (indexed / MANIFEST_NAME).write_text(json.dumps(content))
        with pytest.raises(DatasetError, match="is not in the dataset's folder"):
            verify(indexed, "none", 1)


def test_an_indexed_folder_can_be_inspected(indexed, tmp_path):
    inspect_shards.inspect(indexed, tmp_path / "report", 0, 1)
    assert "10 classes" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--in-place", "--out", "out"), "give either --out DIR or --in-place"),
        ((), "give either --out DIR or --in-place"),
        (("--in-place", "--quality", "80"), "--quality cannot be used with --in-place"),
        (("--in-place", "--val-fraction", ".1"), "--val-fraction cannot be used with --in-place"),
        (("--out", "out", "--check", "headers"), "--check headers needs --geometry original"),
    ],
)
def test_options_that_exclude_each_other_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--input", "in", *arguments])
    assert message in capsys.readouterr().err


def test_packing_below_the_input_does_not_read_its_own_shards_when_it_continues(foreign, tmp_path):
    source = Path(shutil.copytree(foreign, tmp_path / "source"))
    arguments = ("--input", source, "--out", source / "packed", "--size", "32")
    interrupt(pack_module, "write_dataset", *arguments)
    progress = Progress()
    pack_here(*arguments, progress=progress)
    assert progress.counts.images == 0
    run(source)
    assert len(read_manifest(source).splits["val"].shards) == 1


def test_files_outside_tars_cannot_be_indexed(pictures):
    with pytest.raises(SourceError, match="--in-place needs images in tars"):
        run(pictures)


def test_a_tar_whose_name_is_not_utf8_is_refused(foreign, tmp_path):
    """JSON, and so dataset.json, cannot hold such a name."""
    folder = tmp_path / "latin"
    shutil.copytree(foreign, folder)
    first = next(folder.glob("*train*.tar"))
    first.rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9-train-0000.tar"))
    with pytest.raises(SourceError, match=r"names are UTF-8: rename 'caf\\udce9-train-0000.tar'"):
        run(folder)
