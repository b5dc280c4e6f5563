"""Tars are read without being unpacked: all files that tarfile finds, or an error."""

import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing.sources.archives import members
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.packing.storage import read
from tests.trees import assert_refused, tar_of

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def found(path: Path, start: int = 0, end: int | None = None) -> dict[str, bytes]:
    """Return the names of the members with the bytes at their offsets."""
    file = str(path)
    end = path.stat().st_size if end is None else end
    return {name: read(file, offset, size) for name, offset, size in members(file, start, end)}


NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=150)


@settings(max_examples=100)
@given(
    files=st.dictionaries(NAMES.filter(lambda name: name.strip(".")), st.binary(max_size=1100), max_size=6),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 0.5]),  # in pax format a fraction needs another header
    before=st.integers(0, 3),
)
def test_members_have_the_names_and_bytes_that_were_stored(tmp_path_factory, files, form, mtime, before):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    content = tar_of(files, form, mtime)
    path.write_bytes(bytes(before * 100) + content + b"x" * 700)
    assert found(path, before * 100, before * 100 + len(content)) == files


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_folders_are_ignored_and_names_are_normalised(tmp_path, form):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/1.jpg").write_bytes(b"one")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert found(tmp_path / "a.tar") == {"deep/1.jpg": b"one"}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_tar_truncated_anywhere_is_refused_unless_it_has_all_files(tmp_path, form):
    files = {"a.jpg": b"a" * 600, f"{'b' * 90}.jpg": b"b" * 10, "c.jpg": b""}
    content = tar_of(files, form)
    files_end = content.rstrip(b"\0").rfind(b"ustar") // 512 * 512 + 512  # the last file is empty
    path = tmp_path / "short.tar"
    for length in range(0, len(content), 128):
        path.write_bytes(content[:length])
        if length >= files_end + 512:
            assert found(path) == files
        else:
            with pytest.raises(SourceError, match=r"short\.tar is truncated"):
                found(path)


def test_a_damaged_header_is_refused_by_its_offset(tmp_path):
    content = bytearray(tar_of({f"{n}.jpg": bytes([n]) * 700 for n in range(5)}))
    path, rng = tmp_path / "flipped.tar", random.Random(0)
    for file in range(5):
        offset = file * (512 + 1024)
        for _ in range(20):
            damaged = content.copy()
            damaged[offset + rng.randrange(500)] ^= 1 << rng.randrange(7)
            path.write_bytes(damaged)
            with pytest.raises(SourceError, match=rf"flipped\.tar is damaged.* byte {offset}\b"):
                found(path)


def test_a_file_that_is_not_a_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(SourceError, match=r"a\.tar is damaged: .*byte 0\b"):
        found(tmp_path / "a.tar")


def test_a_link_in_a_tar_is_refused(tmp_path):
    (tmp_path / "1.jpg").touch()
    (tmp_path / "2.jpg").hardlink_to(tmp_path / "1.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "1.jpg", arcname="1.jpg")
        tar.add(tmp_path / "2.jpg", arcname="2.jpg")
    with pytest.raises(SourceError, match=r"a\.tar stores 2\.jpg at byte \d+ as a link"):
        found(tmp_path / "a.tar")


def imagenet(root: Path, train: dict[str, bytes], val: bytes | None = None) -> None:
    """Write ImageNet's tars. train: class tars by file name."""
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    (root / "ILSVRC2012_img_val.tar").write_bytes(val or tar_of({"v_1.JPEG": b"v"}))
    (root / "val.txt").write_text("v_1.JPEG n01\n")


def concatenated(*parts: dict[str, bytes]) -> bytes:
    """Return a tar with the members of all parts, among which names may repeat."""
    sizes = [sum(512 + -(-len(content) // 512) * 512 for content in part.values()) for part in parts]
    return b"".join(tar_of(part)[:size] for part, size in zip(parts, sizes, strict=True)) + bytes(1024)


def test_other_files_are_strays_and_the_later_of_two_files_with_one_name_counts(tmp_path):
    train = {"n01.tar": concatenated({"1.JPEG": b"first"}, {"1.JPEG": b"second"}), "readme": b""}
    imagenet(tmp_path, train, tar_of({"v_1.JPEG": b"", "val/prep.sh": b""}))
    sources = find_sources(tmp_path, None, 0)
    assert sources.strays == ["train/readme", "val/prep.sh"]
    (source,) = sources.splits["train"]
    assert read(source.file, source.offset, source.size) == b"second"


def test_the_later_of_two_class_tars_with_one_name_counts(tmp_path):
    imagenet(tmp_path, {})
    first, second, other = (tar_of({f"{n}.JPEG": b""}) for n in (1, 2, 3))
    train = concatenated({"n01.tar": first, "n02.tar": other}, {"n01.tar": second})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train)
    sources = find_sources(tmp_path, None, 0)
    assert sources.classes == ["n01", "n02"]
    found = [(source.path, source.label) for source in sources.splits["train"]]
    assert found == [("train/n01/2.JPEG", 0), ("train/n02/3.JPEG", 1)]


def test_a_truncated_class_tar_is_refused_by_its_offset(tmp_path):
    whole = tar_of({"1.JPEG": b"x" * 3000})
    imagenet(tmp_path, {"n01.tar": whole, "n02.tar": whole[:2048]})
    offset = 512 + len(whole) + 512  # of n02's first header
    assert_refused(tmp_path, rf"ILSVRC2012_img_train\.tar is truncated .*1\.JPEG at byte {offset}\b")


ONE = tar_of({"1.JPEG": b""})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"1.JPEG": b""}, r"train\.tar contains no class tars"),
        ({"n01.tar": ONE, "n02.tar": tar_of({})}, r"no files for the classes n02:"),
    ],
)
def test_a_train_tar_without_class_tars_or_images_is_refused(tmp_path, train, message):
    imagenet(tmp_path, train)
    assert_refused(tmp_path, message)


def test_tars_of_two_years_or_without_val_or_with_a_fraction_are_refused(tmp_path):
    imagenet(tmp_path, {"n01.tar": ONE})
    assert_refused(tmp_path, "omit --val-fraction", 0.1)
    (tmp_path / "ILSVRC2010_images_train.tar").touch()
    assert_refused(tmp_path, r"ILSVRC2010_images_train\.tar .*remove one")
    (tmp_path / "ILSVRC2010_images_train.tar").unlink()
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    assert_refused(tmp_path, "no folder or tar is named val")


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_a_sparse_file_is_refused(tmp_path, form):
    with open(tmp_path / "1.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    made = [
        "tar",
        "--sparse",
        *f"--format={form}".split(),
        "-cf",
        tmp_path / "a.tar",
        "-C",
        tmp_path,
        "1.jpg",
    ]
    subprocess.run(made, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 20
    with pytest.raises(SourceError, match=r"a\.tar .* in pieces: extract the tar"):
        found(tmp_path / "a.tar")
