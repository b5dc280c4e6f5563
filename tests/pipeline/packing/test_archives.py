"""Tars read where they lie: the same files that tarfile finds, and never fewer without a word."""

import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing.sources.archives import members
from pipeline.packing.sources.find import find_sources
from pipeline.packing.sources.listing import SourceError
from pipeline.packing.storage import read

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_bytes(files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def found(path: Path, start: int = 0, end: int | None = None) -> dict[str, bytes]:
    """Names with the bytes at the places that `members` gives."""
    file = str(path)
    end = path.stat().st_size if end is None else end
    return {name: read(file, offset, size) for name, offset, size in members(file, start, end)}


NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=150)


@settings(max_examples=100)
@given(
    files=st.dictionaries(NAMES.filter(lambda name: name.strip(".")), st.binary(max_size=1100), max_size=6),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 0.5]),  # a fraction is a header of its own in the pax form
    before=st.integers(0, 3),
)
def test_names_and_bytes_are_those_that_were_stored(tmp_path_factory, files, form, mtime, before):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    content = tar_bytes(files, form, mtime)
    path.write_bytes(bytes(before * 100) + content + b"x" * 700)
    assert found(path, before * 100, before * 100 + len(content)) == files


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_folders_are_no_files_and_names_are_plain(tmp_path, form):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/1.jpg").write_bytes(b"one")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert found(tmp_path / "a.tar") == {"deep/1.jpg": b"one"}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_tar_cut_anywhere_is_refused_or_whole(tmp_path, form):
    files = {"a.jpg": b"a" * 600, f"{'b' * 90}.jpg": b"b" * 10, "c.jpg": b""}
    content = tar_bytes(files, form)
    files_end = content.rstrip(b"\0").rfind(b"ustar") // 512 * 512 + 512  # the last file is empty
    path = tmp_path / "short.tar"
    for length in range(0, len(content), 128):
        path.write_bytes(content[:length])
        if length >= files_end + 512:
            assert found(path) == files
        else:
            with pytest.raises(SourceError, match=r"short\.tar is truncated"):
                found(path)


def test_a_damaged_header_is_refused_with_its_place(tmp_path):
    content = bytearray(tar_bytes({f"{n}.jpg": bytes([n]) * 700 for n in range(5)}))
    path, rng = tmp_path / "flipped.tar", random.Random(0)
    for file in range(5):
        place = file * (512 + 1024)
        for _ in range(20):
            damaged = content.copy()
            damaged[place + rng.randrange(500)] ^= 1 << rng.randrange(7)
            path.write_bytes(damaged)
            with pytest.raises(SourceError, match=rf"flipped\.tar is damaged.* byte {place}\b"):
                found(path)


def test_what_is_no_tar_is_refused(tmp_path):
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


def imagenet(root: Path, train: dict[str, bytes], val: bytes | None = None) -> Path:
    """train: class tars by file name."""
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(train))
    (root / "ILSVRC2012_img_val.tar").write_bytes(val or tar_bytes({"v_1.JPEG": b"v"}))
    (root / "val.txt").write_text("v_1.JPEG n01\n")
    return root


def test_other_files_in_the_tars_are_listed_and_of_two_with_one_name_the_later_counts(tmp_path):
    twice = tar_bytes({"1.JPEG": b"first"}).rstrip(b"\0").ljust(1024, b"\0") + tar_bytes(
        {"1.JPEG": b"second"}
    )
    imagenet(tmp_path, {"n01.tar": twice, "readme": b""}, tar_bytes({"v_1.JPEG": b"", "val/prep.sh": b""}))
    sources = find_sources(tmp_path, None, 0)
    assert sources.strays == ["train/readme", "val/prep.sh"]
    (source,) = sources.splits["train"]
    assert read(source.file, source.offset, source.size) == b"second"


def test_of_two_class_tars_with_one_name_the_later_counts(tmp_path):
    first, second, other = (tar_bytes({f"{n}.JPEG": b""}) for n in (1, 2, 3))
    path = imagenet(tmp_path, {"n01.tar": first, "n02.tar": other}) / "ILSVRC2012_img_train.tar"
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("n01.tar")
        info.size = len(second)
        tar.addfile(info, io.BytesIO(second))
    sources = find_sources(tmp_path, None, 0)
    assert sources.classes == ["n01", "n02"]
    assert [(s.path, s.label) for s in sources.splits["train"]] == [
        ("train/n01/2.JPEG", 0),
        ("train/n02/3.JPEG", 1),
    ]


def test_a_class_tar_that_is_cut_short_is_named_by_its_place(tmp_path):
    whole = tar_bytes({"1.JPEG": b"x" * 3000})
    imagenet(tmp_path, {"n01.tar": whole, "n02.tar": whole[:2048]})
    place = 512 + len(whole) + 512  # of n02's first header
    with pytest.raises(
        SourceError, match=rf"ILSVRC2012_img_train\.tar is truncated .*1\.JPEG at byte {place}\b"
    ):
        find_sources(tmp_path, None, 0)


def test_a_train_tar_of_images_is_refused(tmp_path):
    imagenet(tmp_path, {"1.JPEG": b""})
    with pytest.raises(SourceError, match=r"train\.tar contains no class tars"):
        find_sources(tmp_path, None, 0)


def test_a_class_tar_without_images_is_refused(tmp_path):
    imagenet(tmp_path, {"n01.tar": tar_bytes({"1.JPEG": b""}), "n02.tar": tar_bytes({})})
    with pytest.raises(SourceError, match=r"no files for the classes n02:"):
        find_sources(tmp_path, None, 0)


def test_a_train_tar_alone_or_of_two_years_is_refused(tmp_path):
    imagenet(tmp_path, {"n01.tar": tar_bytes({"1.JPEG": b""})})
    with pytest.raises(SourceError, match="omit --val-fraction"):
        find_sources(tmp_path, 0.1, 0)
    (tmp_path / "ILSVRC2010_images_train.tar").touch()
    with pytest.raises(SourceError, match=r"ILSVRC2010_images_train\.tar .*remove one"):
        find_sources(tmp_path, None, 0)
    (tmp_path / "ILSVRC2010_images_train.tar").unlink()
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(SourceError, match="neither a val tar nor a folder val"):
        find_sources(tmp_path, None, 0)
