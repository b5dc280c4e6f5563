"""Checks of shards: all damage is reported with its member and byte."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.manifest import Shard, read_manifest
from pipeline.shards import Sample, SampleLocation, dali_index, read_checksums, read_index, write_shard
from tools.verifying.checks import check_shard
from tools.verifying.findings import Decode, ShardCheck

TAR = "train-000001.tar"  # samples 20 to 39 of train


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy of the drawn pictures' shards that tests may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def task_of(folder: Path, decode: Decode = "sampled") -> ShardCheck:
    split = read_manifest(folder).split("train")
    rows, checksums = read_index(folder, split, 10)[20:40], read_checksums(folder, split)[20:40]
    return ShardCheck(folder, split.shards[1], rows, checksums, 10, decode)


def named(task: ShardCheck) -> list[str]:
    found = check_shard(task)
    assert found.count == len(found.problems)
    return [str(problem) for problem in found.problems]


def found_in(folder: Path, decode: Decode = "sampled") -> list[str]:
    return named(task_of(folder, decode))


def edit(path: Path, offset: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    assert content[offset : offset + len(new)] != new
    content[offset : offset + len(new)] = new
    path.write_bytes(content)


def jpeg_at(root: Path, number: int) -> int:
    """Return the offset in TAR of a sample's JPEG."""
    return int(np.load(root / "train.index.npy")["offset"][20 + number])


def test_a_folder_is_not_accepted_as_a_shard(folder):
    (folder / TAR).unlink()
    (folder / TAR).mkdir()
    assert found_in(folder) == [f"{TAR}: cannot be read: Is a directory"]


def test_a_flipped_byte_in_a_header_is_found_and_hides_nothing_else(folder):
    tar = folder / TAR
    header, other = jpeg_at(folder, 3) - 512, jpeg_at(folder, 7)
    edit(tar, header + 2, b"x")
    edit(tar, other, b"\0\0")
    assert found_in(folder) == [
        f"{TAR}, byte {header}: no valid member header",
        f"{TAR}, 000000023.cls, byte {jpeg_at(folder, 4) - 1024}: does not follow the .jpg of the same key",
        f"{TAR}, 000000027.jpg, byte {other}: is not a JPEG",
        f"{TAR}, byte {header + 512}: the sample that the index has at this offset is missing",
        f"{TAR}: its sha256 differs from the one in dataset.json",
        f"{TAR}: has 19 samples, but dataset.json says 20",
    ]


def test_a_page_of_zeros_is_located(folder):
    offset = jpeg_at(folder, 5) - 512
    edit(folder / TAR, offset, bytes(1024))
    found = found_in(folder)
    assert found[0] == f"{TAR}, byte {offset}: zeros where a member's header is expected"
    assert f"{TAR}, byte {offset + 512}: the sample that the index has at this offset is missing" in found


def test_a_truncated_tar_names_the_member_it_ends_in(folder):
    offset = jpeg_at(folder, 15)
    size = (folder / TAR).stat().st_size
    os.truncate(folder / TAR, offset + 100)
    assert found_in(folder) == [
        f"{TAR}, byte {offset - 512}: no valid member header",
        f"{TAR}, byte {offset + 100}: ends without the zeros that end a tar",
        f"{TAR}, byte {offset}: the sample that the index has at this offset is missing, and 4 more after it",
        f"{TAR}: has {offset + 100} bytes, but dataset.json says {size}",
        f"{TAR}: has 15 samples, but dataset.json says 20",
    ]


def test_bytes_after_the_end_are_found(folder):
    size = (folder / TAR).stat().st_size
    with open(folder / TAR, "ab") as file:
        file.write(b"x" * 512)
    assert f"{TAR}: has {size + 512} bytes, but dataset.json says {size}" in found_in(folder)


def test_padding_that_is_not_zero_names_its_byte(folder):
    row = np.load(folder / "train.index.npy")[20]
    offset = int(row["offset"]) + int(row["size"])
    assert offset % 512
    edit(folder / TAR, offset, b"x")
    assert found_in(folder) == [
        f"{TAR}, 000000020.jpg, byte {offset}: nonzero padding bytes after it",
        f"{TAR}: its sha256 differs from the one in dataset.json",
    ]


def test_a_wrong_checksum_makes_every_picture_be_decoded(folder):
    """`sampled` alone would decode every second of twenty; the damaged one is the 12th."""
    row = np.load(folder / "train.index.npy")[31]
    end = int(row["offset"]) + int(row["size"])
    offset = (folder / TAR).read_bytes().index(b"\xff\xda", int(row["offset"])) + 20
    edit(folder / TAR, offset, bytes(end - offset))
    found = found_in(folder)
    assert found[0].startswith(f"{TAR}, 000000031.jpg, byte {row['offset']}: cannot be decoded: ")
    assert found[1:] == [f"{TAR}: its sha256 differs from the one in dataset.json"]
    assert found_in(folder, "none") == [
        f"{TAR}, 000000031.jpg, byte {row['offset']}: its bytes are not those that were packed",
        *found[1:],
    ]


@pytest.mark.parametrize("decode", ["all", "none"])
def test_a_picture_that_still_decodes_is_named_by_its_checksum(folder, decode):
    """The changed byte is in a table of the JPEG, and makes all of its pixels brighter or darker."""
    tar, offset = (folder / TAR).read_bytes(), jpeg_at(folder, 11)
    table = tar.index(b"\xff\xdb", offset) + 5
    edit(folder / TAR, table, bytes([tar[table] + 1]))
    shard = f"{TAR}: its sha256 differs from the one in dataset.json"
    sample = f"{TAR}, 000000031.jpg, byte {offset}: its bytes are not those that were packed"
    assert found_in(folder, decode) == [sample, shard]
    assert named(replace(task_of(folder, decode), checksums=None)) == [shard]


def test_a_checksum_that_does_not_fit_its_sample_is_found_in_a_sound_shard(folder):
    task = task_of(folder)
    swapped = replace(task, checksums=task.checksums[[1, 0, *range(2, 20)]])
    assert [line.partition(":")[0] for line in named(swapped)] == [
        f"{TAR}, 0000000{20 + number}.jpg, byte {jpeg_at(folder, number)}" for number in range(2)
    ]


@pytest.mark.parametrize(
    ("text", "what"), [(b"a", "is 'a', which is not a label"), (b"\xff", r"is '\xff', which is not a label")]
)
def test_an_invalid_label_is_named(folder, text, what):
    offset = jpeg_at(folder, 2) - 1024
    edit(folder / TAR, offset, text)
    assert f"{TAR}, 000000021.cls, byte {offset}: {what}" in found_in(folder)


def jpeg(width: int = 16, height: int = 16, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def in_shard(folder: Path, samples: list[Sample], change: Callable[[np.ndarray], None]) -> list[str]:
    """Return the findings for a new shard of these samples whose index `change` has altered."""
    shard, rows = write_shard(folder / "new.tar", samples)
    change(rows)
    found = named(ShardCheck(folder, shard, rows, None, 10, "sampled"))
    return [line.removeprefix("new.tar, ") for line in found]


def test_pictures_that_differ_from_their_index_are_named(tmp_path):
    samples = [
        Sample("0", jpeg(), 0, 16, 16),
        Sample("1", b"no picture", 1, 16, 16),
        Sample("2", jpeg(mode="L"), 2, 16, 16),
        Sample("3", jpeg(24, 8), 3, 16, 16),
        Sample("4", jpeg(), 10, 16, 16),
    ]
    found = in_shard(tmp_path, samples, lambda rows: None)
    offsets = [(tmp_path / "new.tar").read_bytes().index(f"{key}.jpg".encode()) + 512 for key in range(5)]
    assert found == [
        f"1.jpg, byte {offsets[1]}: is not a JPEG",
        f"2.jpg, byte {offsets[2]}: is L, not RGB",
        f"3.jpg, byte {offsets[3]}: its width is 24, but the index says 16",
        f"3.jpg, byte {offsets[3]}: its height is 8, but the index says 16",
        f"4.cls, byte {offsets[4] + 1536}: its label is 10, but there are only 10 classes",
    ]


def test_members_that_belong_to_no_sample_are_named(tmp_path):
    file, link = tarfile.REGTYPE, tarfile.SYMTYPE
    members = [("a.jpg", jpeg(), file), ("a.cls", b"0", file), ("b.cls", b"0", file), ("c.jpg", jpeg(), file)]
    members += [("d.jpg", jpeg(), file), ("e.cls", b"0", file), ("f.txt", b"0", file), ("l\n.jpg", b"", link)]
    at, offset = {}, 0  # where the content of each begins
    with tarfile.open(tmp_path / "new.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), kind
            tar.addfile(info, io.BytesIO(content))
            at[name[0]] = offset + 512
            offset = at[name[0]] + len(content) + -len(content) % 512
    content = (tmp_path / "new.tar").read_bytes()
    digest = sha256(content).hexdigest()  # of the whole and, being less than 64 KiB, of its head
    shard = Shard(file="new.tar", samples=2, bytes=len(content), sha256=digest, head_sha256=digest)
    assert named(ShardCheck(tmp_path, shard, None, None, 10, "sampled")) == [
        f"new.tar, b.cls, byte {at['b']}: does not follow the .jpg of the same key",
        f"new.tar, c.jpg, byte {at['c']}: is not followed by its .cls",
        f"new.tar, e.cls, byte {at['e']}: does not follow the .jpg of the same key",
        f"new.tar, f.txt, byte {at['f']}: does not follow the .jpg of the same key",
        rf"new.tar, 'l\n.jpg', byte {at['l'] - 512}: is not a regular file",
        f"new.tar, d.jpg, byte {at['d']}: is not followed by its .cls",
        "new.tar: has 1 samples, but dataset.json says 2",
        "new.idx: is missing",
    ]


def test_a_jpeg_header_that_readers_would_refuse_is_named(folder):
    task = task_of(folder)
    shard = task.shard.model_copy(update={"head_sha256": "0" * 64})
    what = "the sha256 of its first 64 KiB differs from the one in dataset.json"
    assert named(replace(task, shard=shard)) == [f"{TAR}: {what}"]


def test_an_index_that_disagrees_with_the_tar_is_named_by_sample(tmp_path):
    def change(rows: np.ndarray) -> None:
        rows["label"][1] += 1
        rows["size"][2] -= 1
        rows["offset"][3] += 512

    found = in_shard(tmp_path, [Sample(str(n), jpeg(), n, 16, 16) for n in range(5)], change)
    offsets = [(tmp_path / "new.tar").read_bytes().index(f"{key}.jpg".encode()) + 512 for key in range(5)]
    size = len(jpeg())
    assert found == [
        f"1.jpg, byte {offsets[1]}: its label is 1, but the index says 2",
        f"2.jpg, byte {offsets[2]}: its size is {size}, but the index says {size - 1}",
        f"3.jpg, byte {offsets[3]}: is not in the index",
        f"byte {offsets[3] + 512}: the sample that the index has at this offset is missing",
    ]


def test_an_idx_is_compared_with_its_tar(folder):
    path = folder / TAR.replace("tar", "idx")
    lines = path.read_text().splitlines()
    jpg, offset, *rest = lines[7].split(" ")
    wrong = " ".join([jpg, str(int(offset) + 1), *rest])
    path.write_text("\n".join([*lines[:7], wrong, *lines[8:], ""]))
    assert found_in(folder) == [f"{path.name}: line 8 is '{wrong}', but for this tar it must be '{lines[7]}'"]
    path.write_text("\n".join([*lines[:7], ""]))
    assert found_in(folder) == [f"{path.name}: line 8 is '', but for this tar it must be '{lines[7]}'"]
    path.write_text("\n".join([*lines, "", ""]))
    assert found_in(folder) == [f"{path.name}: line 23 is '', but for this tar it must be '(nothing)'"]


def test_dalis_index_is_what_wds2idx_makes(folder, tmp_path):
    """Compare with DALI's own tool, which reads the tar by itself."""
    made = tmp_path / "made.idx"
    command = [Path(sys.executable).with_name("wds2idx"), folder / TAR, made]
    subprocess.run(command, check=True, capture_output=True)
    places = []
    for line in made.read_text().splitlines()[1:]:
        _, jpeg_offset, jpeg_size, name, _, label_offset, label_size, _ = line.split()
        numbers = map(int, (jpeg_offset, jpeg_size, label_offset, label_size))
        places.append(SampleLocation(name.removesuffix(".jpg"), *numbers))
    assert dali_index(places) == (folder / TAR.replace("tar", "idx")).read_bytes()
