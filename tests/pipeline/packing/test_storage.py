"""Files are read in parts and written whole, locally and in buckets, which also hold datasets and inputs."""

import signal

import pytest

from pipeline.packing import storage
from pipeline.packing.contents import READ_AHEAD, contents
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.retry import StorageError
from pipeline.storage import absolute
from tests.events import KILL_ALL, at_picture
from tests.trees import pack_here, upload
from tools.make_shards import main

SETTINGS = ("--size", "32", "--shard-samples", "10")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request, tmp_path) -> Folder:
    if request.param == "local":
        (tmp_path / "folder" / STATE_FOLDER).mkdir(parents=True)
        return Folder(tmp_path / "folder")
    return Folder(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def put(folder: Folder, name: str, content: bytes, below: str = ".") -> None:
    with folder.staged(below) as staging:
        (staging / name).write_bytes(content)


def test_files_appear_when_they_are_complete(folder):
    put(folder, "old", b"before")
    with folder.staged() as staging:
        (staging / "a").write_bytes(b"0123456789")
        (staging / "old").write_bytes(b"after")
        assert folder.sizes() == {"old": 6}
        assert folder.read("old") == b"before"
    assert folder.sizes() == {"a": 10, "old": 5}
    assert folder.read("a") == b"0123456789"
    assert folder.read("a", 4) == b"0123"
    assert storage.read(f"{folder}/a", 3) == b"3456789"
    assert storage.read(f"{folder}/a", 3, 4) == b"3456"


def test_no_file_appears_after_an_error(folder):
    def write() -> None:
        with folder.staged() as staging:
            (staging / "a").write_bytes(b"half")
            raise OSError("as of a full disk")

    with pytest.raises(OSError, match="full disk"):
        write()
    assert folder.sizes() == {}
    assert folder.sizes(STATE_FOLDER) == {}


def test_two_writers_of_one_file_do_not_interfere(folder):
    with folder.staged() as one, folder.staged() as other:
        (one / "a").write_bytes(b"one")
        (other / "a").write_bytes(b"other")
    assert folder.read("a") == b"one"  # its block ended last


def test_files_in_subfolders_are_listed_separately_and_removed(folder):
    put(folder, "plan", b"1", STATE_FOLDER)
    put(folder, "a", b"1")
    assert folder.sizes() == {"a": 1}
    assert folder.sizes(STATE_FOLDER) == {"plan": 1}
    folder.remove([f"{STATE_FOLDER}/plan"])
    folder.remove([])
    assert folder.sizes(STATE_FOLDER) == {}
    assert folder.sizes("nowhere") == {}
    with pytest.raises(FileNotFoundError):
        folder.read("nothing")


def test_names_of_local_folders_are_not_taken_for_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a::b", "a:b", "[x]*"):
        (tmp_path / name / STATE_FOLDER).mkdir(parents=True)
        put(Folder(name), "file", b"1")
        assert (tmp_path / name / "file").read_bytes() == b"1"
        assert storage.read(f"{name}/file") == b"1"
    assert str(Folder("a/../b")) == str(tmp_path / "b")
    assert absolute("s3://bucket/a/../b") == "s3://bucket/a/../b"


def test_an_unsupported_protocol_is_an_error_with_the_url():
    with pytest.raises(StorageError, match=r"^gopher://host/a: "):
        Folder("gopher://host/a")
    with pytest.raises(StorageError, match=r"^gopher://host/a: "):
        storage.read("gopher://host/a")


def test_a_server_that_cannot_send_parts_of_files_is_named(tmp_path, website):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert storage.read(f"{website}/a") == b"0123456789"
    with pytest.raises(StorageError, match=f"^{website}/a: .*parts of files"):
        storage.read(f"{website}/a", 3, 4)


# The command with a bucket as its output or input.


def files_in(folder: Folder) -> dict[str, bytes]:
    assert folder.sizes(STATE_FOLDER) == {}
    return {name: folder.read(name) for name in folder.sizes()}


@pytest.fixture(scope="module")
def whole(pictures, make_shards, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole")
    make_shards(pictures, output, *SETTINGS)
    return files_in(Folder(output))


@pytest.mark.slow
def test_packing_into_a_bucket_writes_the_bytes_of_a_folder(pictures, make_shards, call, s3, whole):
    run = make_shards(pictures, f"{s3}/first", *SETTINGS)
    assert f"alexnet-train --data {s3}/first" in run.stdout
    assert files_in(Folder(f"{s3}/first")) == whole
    arguments = ("--input", pictures, "--out", f"{s3}/first")
    again = call(main, *arguments, *SETTINGS)
    assert again.returncode == 1
    assert f"{s3}/first already contains a dataset" in again.stderr
    pack_here(*arguments, "--overwrite", "--size", "32")
    tars = {name for name in Folder(f"{s3}/first").sizes() if name.endswith(".tar")}
    assert tars == {"train-000000.tar", "val-000000.tar"}


@pytest.mark.slow
def test_packing_from_a_bucket_gives_the_bytes_of_a_folder(pictures, make_shards, s3, whole, tmp_path):
    upload(pictures, f"{s3}/pictures")
    make_shards(f"{s3}/pictures", tmp_path / "out", *SETTINGS)
    assert files_in(Folder(tmp_path / "out")) == whole


@pytest.mark.slow
def test_a_killed_run_into_a_bucket_is_continued(pictures, s3, tmp_path, make_shards, call, whole):
    """At the 51st picture, when it is killed, two workers have finished at least three shards of ten."""
    output = Folder(f"{s3}/killed")
    kill = at_picture(51, KILL_ALL, tmp_path / "events", pictures)
    make_shards(pictures, output, *SETTINGS, "--workers", "2", code=-signal.SIGKILL, **kill)
    left = output.sizes()
    assert sum(name.endswith(".tar") for name in left) >= 3
    assert "dataset.json" not in left

    other = call(main, "--input", pictures, "--out", output, *SETTINGS, "--seed", "1")
    assert other.returncode == 1
    assert "differs from it in --seed" in other.stderr
    run = make_shards(pictures, output, *SETTINGS, "--workers", "2")
    assert "were packed by earlier runs" in run.stdout.splitlines()[0]
    assert files_in(output) == whole


def test_files_that_are_read_ahead_keep_their_order(tmp_path):
    target = Folder("memory://order")
    with target.staged() as staging:
        for number in range(2 * READ_AHEAD + 3):
            (staging / str(number)).write_bytes(str(number).encode())
    local = tmp_path / "local"
    local.write_bytes(b"local")
    remote = [SourceImage(str(n), 0, f"{target}/{n}") for n in range(2 * READ_AHEAD + 3)]
    sources = (*remote[:5], SourceImage("local", 0, str(local)), *remote[5:])
    assert [content() for _, content in contents(sources)] == [source.path.encode() for source in sources]
