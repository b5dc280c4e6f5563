"""inspect-shards: the report on a dataset whose content is known."""

import csv
import io
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.manifest import Class, Manifest, Pixels, Split, write_manifest
from pipeline.shards import Sample, write_array, write_shard
from tests.helpers import REPO
from tools.inspect_shards import inspect, main
from tools.inspecting.figures import TILE, TILES

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 10)]


def plain(colour: tuple[int, int, int], width: int = 40, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def dataset(root: Path, names: list[str], **splits: list[tuple[int, bytes]]) -> Path:
    """Write shards of four samples each, given as label and JPEG; each split has keys p000, p001, …"""
    root.mkdir()
    written = {}
    for split, items in splits.items():
        samples = [
            Sample(f"p{n:03d}", jpeg, label, *Image.open(io.BytesIO(jpeg)).size)
            for n, (label, jpeg) in enumerate(items)
        ]
        parts = [samples[start : start + 4] for start in range(0, len(samples), 4)]
        packed = [write_shard(root / f"{split}-{n:06d}.tar", part) for n, part in enumerate(parts)]
        for number, (_, rows) in enumerate(packed):
            rows["shard"] = number
        digest = write_array(root / f"{split}.index.npy", np.concatenate([rows for _, rows in packed]))
        shards = tuple(shard for shard, _ in packed)
        index = f"{split}.index.npy"
        written[split] = Split(samples=len(samples), index=index, index_sha256=digest, shards=shards)
    manifest = Manifest(
        format=1,
        geometry="original",
        size=40,
        max_width=4000,
        max_height=4000,
        classes=tuple(Class(id=f"c{n}", name=name) for n, name in enumerate(names)),
        splits=written,
        pixels=Pixels(mean=(0, 0, 0), eigenvalues=(0, 0, 0), eigenvectors=((1, 0, 0), (0, 1, 0), (0, 0, 1))),
        packed={},
        repaired={"not RGB": 2},
        rejected={},
    )
    write_manifest(root, manifest)
    return root


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8", newline=""), delimiter="\t"))


def test_the_report_describes_the_drawn_pictures(packed, tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/inspect_shards.py", "--data", packed, "--out", tmp_path / "report"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'report/report.md'}: groups of duplicates: 0\n"
    assert [(row["train"], row["val"]) for row in table(tmp_path / "report/classes.tsv")] == [("6", "2")] * 10
    text = (tmp_path / "report/report.md").read_text()
    assert text.startswith(f"# {packed.name}: 80 images in 10 classes\n")
    assert "| width | train | 80 | 80 | 80 | 80 | 80 |" in text
    assert "No two samples have the same bytes." in text
    for name in ("classes.png", "sizes.png", "samples.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / "report" / name) as image:
            image.load()


def test_classes_are_counted_and_missing_ones_named(tmp_path):
    root = dataset(
        tmp_path / "shards",
        ["zero", "one", "$two$ | 2"],
        train=[(label, plain((n, label, 0))) for n, label in enumerate([0, 0, 0, 0, 0, 2, 2])],
        val=[(0, plain((200, 0, 0))), (1, plain((210, 0, 0)))],
    )
    inspect(root, tmp_path / "report", 0, 1)
    assert table(tmp_path / "report/classes.tsv") == [
        {"label": "0", "class": "c0", "name": "zero", "train": "5", "val": "1"},
        {"label": "1", "class": "c1", "name": "one", "train": "0", "val": "1"},
        {"label": "2", "class": "c2", "name": "$two$ | 2", "train": "2", "val": "0"},
    ]
    text = (tmp_path / "report/report.md").read_text()
    megabytes = sum(path.stat().st_size for path in root.glob("train-*.tar")) / 1e6
    assert f"| train | 2 | 7 | {megabytes:.1f} | 0 | 2 | 5 |" in text
    assert "**Classes without samples in train:** c1 one." in text
    assert "**Classes without samples in val:** c2 $two$ \\| 2." in text
    assert "| 2 | c2 $two$ \\| 2 | 2 | 0 |" in text
    assert "Repaired: 2 not RGB." in text


def test_sizes_match_the_pictures(tmp_path):
    widths = [30, 40, 50, 60, 1000]
    items = [(0, plain((n, 0, 0), width, 35)) for n, width in enumerate(widths)]
    root = dataset(tmp_path / "shards", ["zero"], train=items)
    inspect(root, tmp_path / "report", 0, 1)
    text = (tmp_path / "report/report.md").read_text()
    sizes = sorted(len(jpeg) for _, jpeg in items)
    assert "| width | train | 30 | 30 | 50 | 962 | 1,000 |" in text  # 60 + .96 × 940
    assert "| height | train | 35 | 35 | 35 | 35 | 35 |" in text
    assert f"| bytes | train | {sizes[0]:,} |" in text
    assert f"| {sizes[-1]:,} |" in text


@pytest.mark.parametrize("threads", [1, 3])
def test_duplicates_are_named_by_shard_and_key(tmp_path, threads):
    pictures = [plain((n * 20, 0, 0)) for n in range(9)]
    root = dataset(
        tmp_path / "shards",
        ["zero", "one"],
        train=[(0, pictures[n]) for n in (0, 1, 2, 3, 1, 4)],
        val=[(0, pictures[5]), (1, pictures[2]), (0, pictures[6]), (0, pictures[3]), (0, pictures[7])],
    )
    groups = inspect(root, tmp_path / "report", 0, threads)
    first, second, third = (("train-000000.tar", f"p00{n}", "0") for n in (1, 2, 3))
    expected = [
        [("train", *first), ("train", "train-000001.tar", "p004", "0")],
        [("train", *second), ("val", "val-000000.tar", "p001", "1")],
        [("train", *third), ("val", "val-000000.tar", "p003", "0")],
    ]
    assert [[(c.split, c.shard, c.key, str(c.label)) for c in group] for group in groups] == expected
    rows = table(tmp_path / "report/duplicates.tsv")
    found = [(row["group"], row["split"], row["shard"], row["key"], row["label"]) for row in rows]
    assert found == [(str(n), *copy) for n, group in enumerate(expected) for copy in group]
    text = (tmp_path / "report/report.md").read_text()
    assert "- Samples that repeat another one byte for byte: 3; groups: 3\n" in text
    assert "- **Samples of val that are also in train: 2 (40.00%)**" in text
    assert "- **Groups with different labels: 1**" in text
    lines = [line for line in text.splitlines() if line.startswith(("| train p", "| val p"))]
    assert lines == [  # the most harmful first
        "| train p002 (c0 zero); val p001 (c1 one) |",
        "| train p003 (c0 zero); val p003 (c0 zero) |",
        "| train p001 (c0 zero); train p004 (c0 zero) |",
    ]


def test_many_copies_of_one_picture_keep_the_report_short(tmp_path):
    root = dataset(tmp_path / "shards", ["zero"], train=[(0, plain((9, 9, 9)))] * 50)
    inspect(root, tmp_path / "report", 0, 1)
    text = (tmp_path / "report/report.md").read_text()
    assert "- Samples that repeat another one byte for byte: 49; groups: 1\n" in text
    assert "train p005 (c0 zero); and 44 more |" in text
    assert len(table(tmp_path / "report/duplicates.tsv")) == 50


def tiles(path: Path, columns: int) -> np.ndarray:
    """Return the colour in the middle of each tile: [rows,columns,3]."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), int)
    width = pixels.shape[1] // columns
    height = width + 20  # the caption
    assert width >= TILE
    return pixels[TILE // 2 :: height, TILE // 2 :: width][:, :columns]


def test_the_contact_sheet_shows_each_class_at_its_position(tmp_path):
    items = [(label, plain(colour)) for _ in range(3) for label, colour in enumerate(COLOURS)]
    root = dataset(tmp_path / "shards", [f"n{n}" for n in range(4)], train=items)
    inspect(root, tmp_path / "report", 0, 1)
    sheet = tiles(tmp_path / "report/samples.png", 10)
    assert sheet.shape == (4, 10, 3)
    for row, colour in zip(sheet, COLOURS, strict=True):
        assert np.abs(row[:3] - colour).max() < 12
        assert (row[3:] == 255).all()  # there are only three of each class


def test_a_random_choice_of_too_many_classes_is_shown(tmp_path):
    count = TILES + 40
    items = [(n, plain((n, 255 - n, 100))) for n in range(count)]
    root = dataset(tmp_path / "shards", ["name"] * count, train=items)
    shown = []
    for seed in (0, 1, 0):
        inspect(root, tmp_path / "report", seed, 1)
        colours = tiles(tmp_path / "report/samples.png", 10).reshape(-1, 3)
        assert len(colours) == TILES
        assert (np.diff(colours[:, 0]) >= -2).all()  # in the order of their labels, apart from JPEG's error
        shown.append((tmp_path / "report/samples.png").read_bytes())
    assert shown[0] == shown[2] != shown[1]


def test_an_undecodable_picture_is_a_red_tile(tmp_path):
    root = dataset(tmp_path / "shards", ["zero"], train=[(0, plain((0, 0, 250)))])
    tar = root / "train-000000.tar"
    content, jpeg = tar.read_bytes(), plain((0, 0, 250))
    tar.write_bytes(content.replace(jpeg, bytes(len(jpeg))))
    manifest = (root / "dataset.json").read_text()
    for old, new in ((content, tar.read_bytes()), (content[:65536], tar.read_bytes()[:65536])):
        manifest = manifest.replace(sha256(old).hexdigest(), sha256(new).hexdigest())
    (root / "dataset.json").write_text(manifest)
    inspect(root, tmp_path / "report", 0, 1)
    assert tiles(tmp_path / "report/samples.png", 10)[0, 0].tolist() == [255, 0, 0]


def test_letters_missing_in_the_font_cause_no_warning(tmp_path, recwarn):
    root = dataset(tmp_path / "shards", ["猫 $x_"], train=[(0, plain((0, 0, 250)))])
    inspect(root, tmp_path / "report", 0, 1)
    assert not [str(w.message) for w in recwarn.list]
    assert "猫 $x\\_" in (tmp_path / "report/report.md").read_text(encoding="utf-8")


def test_a_damaged_dataset_is_refused_in_one_line(tmp_path, call):
    root = dataset(tmp_path / "shards", ["zero"], train=[(0, plain((0, 0, 250)))])
    (root / "train-000000.tar").unlink()
    done = call(main, "--data", root, "--out", tmp_path / "report")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"inspect-shards: the shard {root / 'train-000000.tar'} is missing")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "report").exists()
