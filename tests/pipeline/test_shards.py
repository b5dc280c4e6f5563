"""Shards are plain tars that tarfile, webdataset and DALI read, and are refused if they are damaged."""

import os
import tarfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types

import pipeline.reader
from pipeline.manifest import Class, DatasetError, Manifest, Pixels, Split, read_manifest
from pipeline.reader import ShardReader
from pipeline.shards import (
    INDEX_DTYPE,
    Sample,
    checksum,
    checksum_array,
    read_checksums,
    write_array,
    write_shard,
)
from tests.helpers import wait_until
from tests.trees import contents


def noise(seed: int, count: int) -> list[Sample]:
    """Return samples of 8 kB; a dozen exceed the 64 KiB that are hashed at opening."""
    rng = np.random.default_rng(seed)
    return [
        Sample(f"{key:09d}", rng.bytes(8000 + 37 * key), int(rng.integers(10)), 80 + key, 80)
        for key in range(count)
    ]


def written(root: Path, *parts: list[Sample]) -> Manifest:
    """Write a dataset of one split, with a shard for each part."""
    shards, rows = [], []
    for number, part in enumerate(parts):
        shard, part_rows = write_shard(root / f"train-{number:06d}.tar", part)
        part_rows["shard"] = number
        shards.append(shard)
        rows.append(part_rows)
    return with_index(root, shards, np.concatenate(rows))


def with_index(root: Path, shards: list, rows: np.ndarray) -> Manifest:
    digest = write_array(root / "train.index.npy", rows)
    samples = sum(shard.samples for shard in shards)
    split = Split(samples=samples, index="train.index.npy", index_sha256=digest, shards=shards)
    axes = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    return Manifest(
        format=1,
        geometry="256",
        size=80,
        max_width=99,
        max_height=80,
        classes=[Class(id=str(n), name=str(n)) for n in range(10)],
        splits={"train": split},
        pixels=Pixels(mean=(0, 0, 0), eigenvalues=(0, 0, 0), eigenvectors=axes),
        packed={},
        repaired={},
        rejected={},
    )


def everything_in(reader: ShardReader) -> list[tuple[bytes, int]]:
    """Return the JPEG bytes and label of each sample, in order."""
    return [(reader.jpeg(n).tobytes(), int(reader.rows["label"][n])) for n in range(len(reader))]


def test_samples_are_read_as_they_were_written(tmp_path):
    parts = [noise(0, 3), noise(1, 1), noise(2, 12)]
    reader = ShardReader(tmp_path, written(tmp_path, *parts), "train")
    everything = [(shard, sample) for shard, part in enumerate(parts) for sample in part]
    assert len(reader) == len(everything)
    for number, (shard, sample) in enumerate(everything):
        jpeg, row = reader.jpeg(number), reader.rows[number]
        assert jpeg.tobytes() == sample.jpeg
        assert (row["label"], row["width"], row["height"]) == (sample.label, sample.width, sample.height)
        path = tmp_path / f"train-{shard:06d}.tar"
        assert reader.location(number) == f"{path} at byte {path.read_bytes().index(sample.jpeg)}"
        assert reader.key(number) == sample.key


def test_the_manifests_entry_describes_the_shard(tmp_path):
    samples = noise(0, 12)
    shard, rows = write_shard(tmp_path / "train-000000.tar", samples)
    content = (tmp_path / "train-000000.tar").read_bytes()
    assert (shard.file, shard.samples, shard.bytes) == ("train-000000.tar", 12, len(content))
    assert shard.sha256 == sha256(content).hexdigest()
    assert shard.head_sha256 == sha256(content[:65536]).hexdigest() != shard.sha256
    assert rows.dtype == INDEX_DTYPE


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, noise(0, 3), noise(1, 2))
    files = contents(tmp_path / "first")
    assert contents(tmp_path / "second") == files
    tars = {f"train-00000{n}.{kind}" for n in (0, 1) for kind in ("tar", "idx")}
    assert files.keys() == tars | {"train.index.npy"}  # and no partial file


def test_without_samples_no_shard_is_written(tmp_path):
    shard, rows = write_shard(tmp_path / "train-000000.tar", [])
    assert shard is None
    assert rows.dtype == INDEX_DTYPE
    assert len(rows) == 0
    assert not list(tmp_path.iterdir())


def test_an_error_among_the_samples_leaves_no_file(tmp_path):
    def samples() -> Iterator[Sample]:
        yield from noise(0, 2)
        raise OSError("the third cannot be had")

    with pytest.raises(OSError, match="the third"):
        write_shard(tmp_path / "train-000000.tar", samples())
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["train", "val"])
def reader(packed: Path, request: pytest.FixtureRequest) -> ShardReader:
    """A reader of each split of the packed pictures."""
    return ShardReader(packed, read_manifest(packed), request.param)


def test_tarfile_reads_shards(packed, reader):
    found = []
    for shard in reader.split.shards:
        with tarfile.open(packed / shard.file) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        assert all(
            (m.type, m.mtime, m.uid, m.gid, m.uname, m.gname) == (tarfile.REGTYPE, 0, 0, 0, "", "")
            for m, _ in members
        )
        names, contents = [m.name for m, _ in members], [content for _, content in members]
        assert names == [f"{name[:-4]}{kind}" for name in names[::2] for kind in (".jpg", ".cls")]
        found += zip(contents[::2], map(int, contents[1::2]), strict=True)
    assert found == everything_in(reader)


def test_webdataset_reads_shards(packed, reader):
    urls = [str(packed / shard.file) for shard in reader.split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == everything_in(reader)
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(len(samples))]


def test_dali_reads_shards_with_our_index(packed, reader):
    tars = [packed / shard.file for shard in reader.split.shards]

    @pipeline_def(batch_size=len(reader), num_threads=1, device_id=None)
    def graph() -> tuple:
        outputs = fn.readers.webdataset(
            paths=list(map(str, tars)),
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["jpg", "cls"],
            dtypes=[types.UINT8, types.UINT8],
            missing_component_behavior="error",
        )
        return tuple(outputs)

    jpegs, labels = ([np.array(item) for item in output] for output in graph().run())
    found = [(jpeg.tobytes(), int(label.tobytes())) for jpeg, label in zip(jpegs, labels, strict=True)]
    assert found == everything_in(reader)


def change_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (lambda path: os.truncate(path, 20479), "has 20479 bytes, but .* says 20480"),
    "longer": (lambda path: os.truncate(path, 20481), "has 20481 bytes, but .* says 20480"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes"),
    "changed": (change_one_byte, "is not the one that was packed"),
}


@pytest.mark.parametrize(("change", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named(change, reason, tmp_path):
    manifest = written(tmp_path, noise(0, 2), noise(1, 2))
    path = tmp_path / "train-000001.tar"
    change(path)
    with pytest.raises(DatasetError, match=f"the shard {path} {reason}.*: copy it again"):
        ShardReader(tmp_path, manifest, "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(Path.unlink, "is missing"), (change_one_byte, "does not match its checksum in dataset.json")],
)
def test_a_missing_or_changed_index_is_named(change, reason, tmp_path):
    manifest = written(tmp_path, noise(0, 4))
    path = tmp_path / "train.index.npy"
    change(path)
    with pytest.raises(DatasetError, match=f"the index {path} {reason}.*: copy"):
        ShardReader(tmp_path, manifest, "train")


def with_value(field: str, value: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a change of the last row of an index."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows[field][-1] = value
        return rows

    return change


MISMATCHES = {
    "a width above the maximum": with_value("width", 100),
    "a height above the maximum": with_value("height", 81),
    "no width": with_value("width", 0),
    "no bytes": with_value("size", 0),
    "a missing row": lambda rows: rows[:-1],
    "an extra row": lambda rows: np.concatenate((rows, rows[:1])),
    "rows not in the order of shards": lambda rows: rows[[0, 2, 1, 3]],
    "another type": lambda rows: rows.astype([(name, "<i8") for name in rows.dtype.names]),
    "no such shard": with_value("shard", 2),
    "an empty array": lambda rows: np.array([]),
    "several dimensions": lambda rows: rows[:, None],
    "no such class": with_value("label", 10),
    "an offset beyond the end": with_value("offset", 40000),
    "longer than the file": with_value("size", 2**32 - 1),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_an_index_that_does_not_fit_is_refused(mismatch, tmp_path):
    manifest = written(tmp_path, noise(0, 2), noise(1, 2))
    ShardReader(tmp_path, manifest, "train")  # accepts the right index
    rows = np.load(tmp_path / "train.index.npy")
    manifest = with_index(tmp_path, list(manifest.split("train").shards), MISMATCHES[mismatch](rows))
    with pytest.raises(DatasetError, match=f"the index {tmp_path / 'train.index.npy'} disagrees .*: pack"):
        ShardReader(tmp_path, manifest, "train")


def test_an_index_that_is_not_an_array_is_refused(tmp_path):
    manifest = written(tmp_path, noise(0, 2))
    (tmp_path / "train.index.npy").write_bytes(b"no array")
    digest = sha256(b"no array").hexdigest()
    split = manifest.split("train").model_copy(update={"index_sha256": digest})
    with pytest.raises(DatasetError, match="disagrees"):
        ShardReader(tmp_path, manifest.model_copy(update={"splits": {"train": split}}), "train")


def with_checksums(root: Path, checksums: np.ndarray) -> Split:
    """Return the split of two samples, to which a checksum file is added."""
    digest = write_array(root / "sums.npy", checksums)
    added = {"checksums": "sums.npy", "checksums_sha256": digest}
    return written(root, noise(0, 2)).split("train").model_copy(update=added)


def test_checksums_are_read_back(tmp_path):
    assert read_checksums(tmp_path, written(tmp_path, noise(0, 2)).split("train")) is None
    checksums = checksum_array([checksum(b"one"), checksum(b"other")])
    assert checksums.tobytes() == sha256(b"one").digest()[:8] + sha256(b"other").digest()[:8]
    found = read_checksums(tmp_path, with_checksums(tmp_path, checksums))
    np.testing.assert_array_equal(found, checksums)


WRONG_CHECKSUMS = {
    "a missing row": np.zeros((1, 8), np.uint8),
    "an extra row": np.zeros((3, 8), np.uint8),
    "shorter checksums": np.zeros((2, 4), np.uint8),
    "another type": np.zeros((2, 8), np.int8),
}


@pytest.mark.parametrize("mismatch", WRONG_CHECKSUMS)
def test_checksums_that_do_not_fit_are_refused(mismatch, tmp_path):
    split = with_checksums(tmp_path, WRONG_CHECKSUMS[mismatch])
    with pytest.raises(DatasetError, match=f"the checksum file {tmp_path / 'sums.npy'} disagrees .*: pack"):
        read_checksums(tmp_path, split)


def test_a_damaged_or_missing_checksum_file_is_refused(tmp_path):
    split = with_checksums(tmp_path, np.zeros((2, 8), np.uint8))
    (tmp_path / "sums.npy").write_bytes((tmp_path / "sums.npy").read_bytes()[:-1] + b"1")
    with pytest.raises(DatasetError, match=r"does not match its checksum in dataset.json: copy"):
        read_checksums(tmp_path, split)
    (tmp_path / "sums.npy").unlink()
    with pytest.raises(DatasetError, match=r"the checksum file .* is missing: copy"):
        read_checksums(tmp_path, split)


def test_a_damaged_tar_header_is_named_instead_of_giving_a_key(tmp_path):
    """The damage is behind the 64 KiB that opening reads."""
    manifest = written(tmp_path, noise(0, 12))
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    header = content.index(b"000000010.jpg")
    content[header] ^= 1
    path.write_bytes(content)
    reader = ShardReader(tmp_path, manifest, "train")
    assert reader.key(11) == "000000011"
    with pytest.raises(DatasetError, match=f"no tar header before {path} at byte {header + 512}: copy"):
        reader.key(10)


def test_samples_that_will_be_needed_are_fetched_from_the_disk(tmp_path):
    reader = ShardReader(tmp_path, written(tmp_path, noise(0, 12), noise(1, 12)), "train")
    paths = [tmp_path / shard.file for shard in reader.split.shards]

    def in_memory(number: int) -> bool:
        row = reader.rows[number]
        with open(paths[row["shard"]], "rb") as file:
            try:
                wanted = int(row["size"])
                return os.preadv(file.fileno(), [bytearray(wanted)], row["offset"], os.RWF_NOWAIT) == wanted
            except BlockingIOError:
                return False

    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        forgotten = [number for number in range(len(reader)) if not in_memory(number)]
    except OSError:
        pytest.skip("this file system does not say what is in memory")
    if not forgotten:
        pytest.skip("this file system keeps what it is told to forget")

    reader.prefetch(np.array(forgotten[-1:]))
    wait_until(lambda: in_memory(forgotten[-1]))


@pytest.mark.parametrize(("memory", "stays"), [(10**9, True), (10**5, False)])
def test_a_split_larger_than_half_of_the_memory_does_not_stay(memory, stays, tmp_path, monkeypatch):
    reader = ShardReader(tmp_path, written(tmp_path, noise(0, 12)), "train")  # 100 kB
    monkeypatch.setattr(pipeline.reader, "memory_bytes", lambda: memory)
    assert reader.fits_in_page_cache == stays
