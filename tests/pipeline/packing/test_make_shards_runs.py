"""The packing command refuses and fails with one line that says why, and never leaves half a dataset."""

import errno
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.manifest import read_manifest
from pipeline.packing import executors
from pipeline.packing.finish import write_report
from pipeline.packing.shard import PackingError
from pipeline.packing.sources.find import Sources
from pipeline.packing.storage import STATE_FOLDER, Folder
from tests.trees import ODD, contents, threads, touch, write
from tools import make_shards as module
from tools.draw_pictures import draw


def assert_one_line(run: subprocess.CompletedProcess, *words: str) -> None:
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("make-shards: ")
    assert run.stderr.count("\n") == 1, run.stderr
    for word in words:
        assert word in run.stderr


@pytest.fixture
def pack(call, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """pack(input, output, *arguments): run the command in this process, with a thread as its worker."""

    def run(source: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(executors, "processes", threads)
        return call(module.main, "--input", source, "--out", output, "--workers", "1", *arguments)

    return run


def files_named(folder: Path) -> set[str]:
    """Return the names of the files that belong to the dataset according to its manifest."""
    splits = read_manifest(folder).splits.values()
    tars = [shard.file for split in splits for shard in split.shards]
    indices = [
        *(name for split in splits for name in (split.index, split.checksums)),
        *(f"{tar[:-4]}.idx" for tar in tars),
    ]
    return {"dataset.json", "report.tsv", *tars, *indices}


def test_neither_help_nor_packing_imports_torch_dali_or_webdataset(pictures, make_shards, tmp_path):
    for name in ("torch", "nvidia", "webdataset"):  # modules that kill whoever imports them
        (tmp_path / "poison" / name).mkdir(parents=True)
        (tmp_path / "poison" / name / "__init__.py").write_text("import os\nos._exit(86)\n")
    poison = {"PYTHONPATH": str(tmp_path / "poison")}
    for name in ("torch", "nvidia.dali", "webdataset"):
        probe = subprocess.run([sys.executable, "-c", f"import {name}"], env=os.environ | poison, check=False)
        assert probe.returncode == 86
    usage = make_shards(pictures, tmp_path / "out", "--help", **poison).stdout
    assert usage.startswith("usage: make_shards.py")
    run = make_shards(pictures, tmp_path / "out", "--size", "32", **poison)
    assert run.stdout.startswith("80 images (60 train, 20 val) of 10 classes, ")


def test_an_existing_dataset_is_kept_unless_overwrite_is_given(pictures, packed_copy, pack):
    output, before = packed_copy, contents(packed_copy)
    assert_one_line(pack(pictures, output), "already contains a dataset", "--overwrite")
    assert contents(output) == before

    (output / "mine.txt").write_text("not the packer's")
    run = pack(pictures, output, "--overwrite", "--size", "32", "--seed", "1")  # fewer shards, too
    assert run.returncode == 0, run.stderr
    assert read_manifest(output).size == 32
    assert {path.name for path in output.iterdir()} == files_named(output) | {"mine.txt"}


def test_overwrite_with_an_unusable_input_keeps_the_dataset(packed_copy, pack, tmp_path):
    before = contents(packed_copy)
    source = touch(tmp_path / "in", "train/", "val/")
    assert_one_line(pack(source, packed_copy, "--overwrite"), "no class folders")
    assert contents(packed_copy) == before


def test_overwrite_replaces_a_dataset_with_a_broken_manifest(pictures, pack, tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    assert pack(pictures, tmp_path, "--overwrite", "--size", "32").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == files_named(tmp_path)


FULL_DISK = """
import errno, os
real = os.fsync
def fsync(file):  # at the second shard, the disk is full
    if os.path.basename(os.readlink(f"/proc/self/fd/{file}")).startswith(".train-000001.tar"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(file)
os.fsync = fsync
"""


def test_a_full_disk_is_named_and_the_same_command_continues(pictures, make_shards, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/sitecustomize.py").write_text(FULL_DISK)
    output, settings = tmp_path / "out", ("--size", "32", "--shard-samples", "30")
    run = make_shards(pictures, output, *settings, code=1, PYTHONPATH=str(tmp_path / "full"))
    assert_one_line(run, os.strerror(errno.ENOSPC), str(output), "same command")
    names = {path.name for path in output.iterdir()}
    assert {"train-000000.tar", "train-000000.idx"} <= names
    assert not {"train-000001.tar", "dataset.json"} & names
    for path in output.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) in (2 * 30, 2 * 20)
    assert not list(output.rglob("*.partial"))
    before = (output / "train-000000.tar").stat()

    make_shards(pictures, output, *settings)  # with space on the disk
    assert {path.name for path in output.iterdir()} == files_named(output)
    assert (output / "train-000000.tar").stat() == before


FAILURES = {
    "a worker died": (PackingError("a worker died: fewer --workers"), "fewer --workers"),
    "a lost input folder": (FileNotFoundError(2, "No such file or directory", "/gone"), "/gone"),
    "a full disk, unnamed": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "interrupted": (KeyboardInterrupt(), None),
}


@pytest.mark.parametrize(("error", "words"), FAILURES.values(), ids=FAILURES)
def test_an_error_while_packing_is_one_line_and_leaves_no_manifest(
    pictures, pack, tmp_path, monkeypatch, error, words
):
    def run_tasks(*_):
        raise error

    monkeypatch.setattr(executors, "run_tasks", run_tasks)
    run = pack(pictures, tmp_path)
    if words is None:
        assert (run.returncode, run.stderr) == (130, "")  # 128 + SIGINT, as in shells
    else:
        assert_one_line(run, words)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FOLDER]


def test_a_split_without_usable_files_is_an_error(pack, tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "in" / split / "a/1.jpg", "no image")
    assert_one_line(pack(tmp_path / "in", tmp_path / "out"), "'train'", str(tmp_path / "out/report.tsv"))
    assert "train/a/1.jpg\trejected\tnot an image" in (tmp_path / "out/report.tsv").read_text()
    assert not (tmp_path / "out/dataset.json").exists()


def test_any_file_name_takes_one_row_of_the_report(tmp_path):
    (tmp_path / STATE_FOLDER).mkdir()
    write_report(Folder(tmp_path), Sources([], {}, ["two\nlines", "a\ttab"]), [])
    rows = (tmp_path / "report.tsv").read_text().splitlines()
    assert [row.count("\t") for row in rows] == [2, 2, 2]


def test_a_missing_input_is_one_line(make_shards, tmp_path):
    run = make_shards(tmp_path / "missing", tmp_path / "out", code=1)
    assert_one_line(run, "--input", "does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [
        *("--quality 0", "--quality 101", "--quality 200", "--quality ten", "--size 15", "--size 4097"),
        *("--val-fraction 0", "--val-fraction 1", "--val-fraction 2", "--val-fraction nan", "--geometry 224"),
        *("--workers 0", "--shard-samples 0", "--seed -1", "--epochs 3", "--over"),
        *("--max-reject-ratio 1.1", "--metrics-port 0", "--executor dask", "--scheduler tcp://h:1"),
    ],
)
def test_invalid_arguments_are_refused_by_name(bad, capsys):
    with pytest.raises(SystemExit) as end:
        module.parse_arguments(["--input", "in", "--out", "out", *bad.split()])
    assert end.value.code == 2
    assert bad.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("missing", ["--input", "--out"])
def test_input_and_output_must_be_given(missing, capsys):
    given = {"--input": "in", "--out": "out"}
    del given[missing]
    with pytest.raises(SystemExit, match="2"):
        module.parse_arguments([part for pair in given.items() for part in pair])
    assert missing in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not ODD.is_dir(), reason="TEST_DATA has no odd images")
def test_every_odd_file_is_packed_or_rejected(pack, tmp_path):
    rows = [line.split("\t") for line in (ODD / "MANIFEST.tsv").read_text().splitlines()[1:]]
    for split in ("train", "val"):
        (tmp_path / "in" / split / "good").mkdir(parents=True)
        for number in range(3):
            image = draw("warm_disc", np.random.default_rng(number))
            image.save(tmp_path / "in" / split / "good" / f"{number}.JPEG")
    (tmp_path / "in/train/odd").symlink_to(ODD / "files")
    run = pack(tmp_path / "in", tmp_path / "out", "--size", "32", "--max-reject-ratio", "0.5")
    assert run.returncode == 0, run.stderr
    report = [line.split("\t") for line in (tmp_path / "out/report.tsv").read_text().splitlines()[1:]]
    rejected = {Path(path).name for path, outcome, _ in report if outcome == "rejected"}
    for name, _, expected, *_ in rows:
        if expected.startswith("reject"):
            assert name in rejected
        if expected.startswith("valid") and name != "strip_1000x1.jpg":
            assert name not in rejected
    manifest = read_manifest(tmp_path / "out")
    assert manifest.split("train").samples == 3 + len(rows) - len(rejected)
    assert sum(manifest.rejected.values()) == len(rejected)
    assert manifest.split("val").samples == 3


def test_an_output_that_would_be_a_class_folder_is_refused(pictures, pack):
    run = pack(pictures / "train", pictures / "train/shards", "--val-fraction", "0.5")
    assert_one_line(run, "inside --input")
    assert not (pictures / "train/shards").exists()


@pytest.mark.parametrize(("limit", "code"), [("0.04", 1), ("0.06", 0)])
def test_too_many_rejects_are_an_error_that_keeps_the_dataset(pictures, pack, tmp_path, limit, code):
    source = shutil.copytree(pictures, tmp_path / "in")
    for path in list(source.glob("train/*/*_0.JPEG"))[:4]:  # 4 of 80: .05
        path.write_bytes(b"")
    run = pack(source, tmp_path / "out", "--size", "32", "--max-reject-ratio", limit)
    assert run.returncode == code, run.stderr
    assert run.stdout.startswith("76 images (56 train, 20 val)")
    assert read_manifest(tmp_path / "out").rejected == {"empty": 4}
    if code:
        words = "4 of 80 files were rejected (5.0%), more than --max-reject-ratio 0.04"
        assert run.stderr.startswith(f"make-shards: {words}")
    assert {path.name for path in (tmp_path / "out").iterdir()} == files_named(tmp_path / "out")


def test_a_pipe_among_the_images_is_unreadable_and_does_not_stop_the_run(pictures, pack, tmp_path):
    source = shutil.copytree(pictures, tmp_path / "in")
    os.mkfifo(next(source.glob("train/*")) / "pipe.jpg")
    run = pack(source, tmp_path / "out", "--size", "32", "--max-reject-ratio", "0.02")
    assert run.returncode == 0, run.stderr
    assert "pipe.jpg\trejected\tunreadable" in (tmp_path / "out/report.tsv").read_text()
