"""An unfinished output is continued by the same command and protected from any other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from PIL import Image

from pipeline.manifest import MANIFEST_NAME, read_manifest
from pipeline.packing import executors, resume
from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError
from pipeline.packing.shard_results import SUFFIX
from pipeline.packing.sources.find import SourceError
from pipeline.packing.storage import STATE_FOLDER
from tests.events import HOLD, at_picture, events
from tests.helpers import REPO, has_ended, wait_until
from tests.trees import contents, encode, pack_here
from tools.make_shards import pack, parse_arguments

SETTINGS = ("--size", "32", "--shard-samples", "10", "--max-reject-ratio", "1")
SHARDS = 8  # for 60 training and 20 validation images


@pytest.fixture(scope="module")
def source(pictures, tmp_path_factory) -> Path:
    """The drawn pictures, with a file to repair and one to reject, so that records have events."""
    root = shutil.copytree(pictures, tmp_path_factory.mktemp("source") / "in")
    first, second, *_ = sorted(root.glob("train/*/*"))
    first.write_bytes(b"no image")
    second.write_bytes(encode(Image.new("L", (1, 1)), "GIF"))
    return root


def run(source: Path, output: Path, *arguments: str) -> Progress:
    progress = Progress()
    pack_here("--input", source, "--out", output, *SETTINGS, *arguments, progress=progress)
    return progress


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert run(source, output).before == 0
    return contents(output)


@pytest.fixture
def unfinished(source, tmp_path) -> Path:
    """An output with all shards and records, whose run was interrupted before it wrote the index."""
    output = tmp_path / "unfinished"
    interrupted = patch("pipeline.packing.pack.write_dataset", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        run(source, output)
    assert len(list((output / STATE_FOLDER).glob(f"*{SUFFIX}"))) == SHARDS
    return output


def record(output: Path, name: str) -> Path:
    return output / STATE_FOLDER / f"{name}{SUFFIX}"


def test_finished_shards_are_not_packed_again(source, whole, unfinished):
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.tar")}
    progress = run(source, unfinished)
    assert (progress.before, progress.counts.images) == (80, 0)
    assert {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.tar")} == before
    assert contents(unfinished) == whole


DAMAGES = {
    "no record": lambda output: record(output, "train-000001.tar").unlink(),
    "no shard": lambda output: (output / "train-000001.tar").unlink(),
    "no index": lambda output: (output / "train-000001.idx").unlink(),
    "an empty index": lambda output: (output / "train-000001.idx").write_bytes(b""),
    "a truncated shard": lambda output: (output / "train-000001.tar").write_bytes(b"short"),
    "a shard of zeros": lambda output: (output / "train-000001.tar").write_bytes(
        bytes((output / "train-000001.tar").stat().st_size)
    ),
    "a broken record": lambda output: record(output, "train-000001.tar").write_text('{"shard": '),
    "a record of another form": lambda output: record(output, "train-000001.tar").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_or_record_is_packed_again(source, whole, unfinished, damage):
    damage(unfinished)
    progress = run(source, unfinished)
    assert (progress.before, progress.counts.images) == (70, 10)
    assert contents(unfinished) == whole


def test_partial_files_of_a_killed_worker_are_removed(source, whole, unfinished):
    (unfinished / STATE_FOLDER / "tmpabc").mkdir()
    (unfinished / STATE_FOLDER / "tmpabc/.train-000001.tar.partial").write_bytes(b"half")
    run(source, unfinished)
    assert contents(unfinished) == whole


OTHERS = {
    "--seed": ("--seed", "1"),
    "--size": ("--size", "33"),
    "--quality": ("--quality", "89"),
    "--geometry": ("--geometry", "short256"),
    "--shard-samples": ("--shard-samples", "11"),
}


@pytest.mark.parametrize(("name", "arguments"), OTHERS.items())
def test_other_settings_are_refused_by_name(source, unfinished, name, arguments):
    before = contents(unfinished)
    with pytest.raises(SourceError, match=rf"differs from it in {name}.*: .*--overwrite"):
        run(source, unfinished, *arguments)
    assert contents(unfinished) == before
    run(source, unfinished, *arguments, "--overwrite")
    manifest = read_manifest(unfinished)
    shards = {shard.file for split in manifest.splits.values() for shard in split.shards}
    assert {path.name for path in unfinished.glob("*.tar")} == shards
    assert not (unfinished / STATE_FOLDER).exists()


def test_other_files_and_other_versions_are_refused(source, unfinished, tmp_path, monkeypatch):
    more = shutil.copytree(source, tmp_path / "more")
    with pytest.raises(SourceError, match="differs from it in --input, the files found:"):
        run(more, unfinished)
    monkeypatch.setattr("PIL.__version__", "1.0")
    with pytest.raises(SourceError, match="differs from it in the packer:"):
        run(source, unfinished)


def test_more_workers_can_continue(source, whole, unfinished):
    record(unfinished, "train-000001.tar").unlink()
    record(unfinished, "val-000001.tar").unlink()
    options = ("--input", str(source), "--out", str(unfinished), *SETTINGS, "--workers", "2")
    pack(parse_arguments([*options]).packing)
    assert contents(unfinished) == whole


def test_a_run_stopped_after_its_manifest_only_tidies_up(source, whole, tmp_path):
    """A kill in `end` may leave some of the records, and always leaves the plan."""
    with patch.object(resume, "clean_up"):
        run(source, tmp_path)
    record(tmp_path, "train-000001.tar").unlink()
    assert run(source, tmp_path).counts.images == 0
    assert contents(tmp_path) == whole


def test_interrupted_overwriting_leaves_nothing_of_the_old_dataset(source, whole, tmp_path):
    run(source, tmp_path, "--shard-samples", "5")
    interrupted = patch.object(resume, "_remove_records", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        run(source, tmp_path, "--overwrite")
    assert not (tmp_path / MANIFEST_NAME).exists()
    (tmp_path / "train-000011.tar").write_bytes(b"a shard that was not removed yet")
    with pytest.raises(SourceError, match="unfinished"):
        run(source, tmp_path)
    run(source, tmp_path, "--overwrite")
    assert contents(tmp_path) == whole


def test_a_second_run_is_refused_while_the_first_is_running(
    source, whole, tmp_path, make_shards, monkeypatch
):
    refused = []

    def run_tasks(*arguments):
        refused.append(make_shards(source, tmp_path, *SETTINGS, code=1))
        return real(*arguments)

    real = executors.run_tasks
    monkeypatch.setattr(executors, "run_tasks", run_tasks)
    run(source, tmp_path)
    assert refused[0].stderr.startswith(f"make-shards: another run is packing into {tmp_path}")
    assert contents(tmp_path) == whole


def test_a_refused_run_leaves_a_dataset_as_it_was(source, whole, tmp_path):
    run(source, tmp_path)
    with pytest.raises(SourceError, match="already contains a dataset"):
        run(source, tmp_path)
    assert contents(tmp_path) == whole
    assert not (tmp_path / STATE_FOLDER).exists()


def test_the_plan_is_readable(unfinished, source):
    plan = json.loads((unfinished / STATE_FOLDER / "plan.json").read_text())
    assert (plan["--seed"], plan["--size"], plan["--input"]) == (0, 32, str(source))


def test_workers_end_when_the_command_is_killed(source, tmp_path):
    """It is killed while one of them waits at a picture, so that work is left."""
    held = at_picture(31, HOLD, tmp_path / "events", source)
    command = [sys.executable, "tools/make_shards.py", "--input", source, "--out", tmp_path / "out"]
    with subprocess.Popen([*command, "--workers=2"], cwd=REPO, env=os.environ | held) as process:
        wait_until(lambda: len(events(tmp_path / "events")) >= 31, process)
        workers = psutil.Process(process.pid).children()
        process.kill()  # it alone
    assert len(workers) >= 2
    wait_until(lambda: all(map(has_ended, workers)))


def test_versions_that_differ_in_a_worker_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.packing.planning.versions", lambda: {"pillow": "1.0"})
    with pytest.raises(PackingError, match="install the same versions"):
        run(source, tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_shards_that_are_the_input_are_never_replaced(pictures, tmp_path, linked):
    shards = tmp_path / "shards"
    pack_here("--input", pictures, "--out", shards, *SETTINGS)
    before, source = contents(shards), shards
    if linked:
        source = tmp_path / "link"
        source.symlink_to(shards)
    for overwrite in ((), ("--overwrite",)):
        with pytest.raises(SourceError, match=r"--out .*shards holds train-000000.tar, a part of --input"):
            pack_here("--input", source, "--out", shards, "--size", "16", *overwrite)
    assert contents(shards) == before
