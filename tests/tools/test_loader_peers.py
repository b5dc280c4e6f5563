"""Other input pipelines: how they take turns, what they deliver, and their errors."""

import itertools
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import REPO, wait_until
from tools.benchmarks.loader_peers import Peer, PeerError, rate
from tools.benchmarks.peer_job import Job
from tools.benchmarks.peer_pipelines import PEERS

PEERS_PYTHON = REPO / ".loader-peers/bin/python"


@pytest.fixture
def job(packed, tmp_path) -> Job:
    """A job with batches of 20 of the 60 pictures, for short epochs."""
    return Job(packed, batch=20, crop=67, threads=2, scratch=tmp_path)


def python_of(peer: str) -> Path:
    if peer != "dali" and not PEERS_PYTHON.exists():
        pytest.skip("their environment does not exist: make .loader-peers")
    return Path(sys.executable) if peer == "dali" else PEERS_PYTHON


def refusal(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "tools.benchmarks.loader_peers", *arguments]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    return done.stderr


def test_images_prefetched_before_a_turn_are_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def batches():
        for number in itertools.count():
            now[0] += 0.0 if number < 50 else 0.25  # fifty are ready, then four arrive per second
            yield None, [0] * 10

    assert rate(batches(), seconds=5.0) == 40.0


def test_work_on_a_gpu_is_timed_until_it_has_finished(monkeypatch):
    now = [0.0]

    def finish():
        now[0] += 5.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", finish)

    def batches():
        while True:
            now[0] += 0.25
            yield None, [0] * 10

    assert rate(batches(), seconds=5.0, device="cuda") == 20.0  # 200 images requested in 5 s, finished in 10


def test_samples_and_files_match_the_train_shards(job):
    samples = list(job.samples())
    assert len(samples) == 60
    assert [sum(label == wanted for _, label in samples) for wanted in range(10)] == [6] * 10
    files = job.files()
    assert [(Path(path).read_bytes(), label) for path, label in files] == samples
    assert {(Path(path).parent.name, label) for path, label in files} == {(f"{n:04d}", n) for n in range(10)}


def test_a_crop_that_is_not_resized_has_a_fixed_part_of_the_area(job):
    assert job.scale == ((67 / 80) ** 2,) * 2
    assert job.ratio == (1, 1)


@pytest.mark.parametrize("resized", [False, True])
def test_dali_delivers_normalised_float_crops_past_the_end_of_an_epoch(job, resized):
    batches = list(itertools.islice(PEERS["dali"][0](replace(job, resized_crops=resized)), 5))
    for images, labels in batches:
        assert images.shape == (20, 3, 67, 67)
        assert images.dtype == torch.float32
        assert len(labels) == 20
    pixels = torch.cat([images for images, _ in batches])
    assert pixels.min() < 0 < pixels.max() < 2.7  # (1 - .406) / .225
    assert not torch.equal(batches[0][0], batches[3][0])


def states(group: int) -> set[str]:
    """Return the states of the processes in a group: R for running, T for stopped, …"""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, of, *_ = path.read_text().rpartition(") ")[2].split()
            found |= {state} if int(of) == group else set()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_starts_once_and_is_stopped_between_turns(peer, job, resized):
    started = Peer(python_of(peer), peer, replace(job, resized_crops=resized), seconds=0.2)
    try:
        assert started.versions["torch"]
        assert started.measure() > 0
        assert started.measure() > 0
        # The signal stops a process that is waiting for a core only once it gets one.
        wait_until(lambda: states(started.process.pid) <= {"T", "Z"}, started.process)
    finally:
        started.close()
    assert started.process.returncode == 0


def test_a_missing_package_is_reported_in_one_line(packed, tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'torchvision'\")\n"
    (tmp_path / "torchvision.py").write_text(missing)  # found before an installed one
    line = refusal("pytorch", "--data", str(packed), "--crop", "67", PYTHONPATH=str(tmp_path))
    assert line.startswith("loader_peers: pytorch is not installed in ")
    assert "torchvision" in line
    assert line.count("\n") == 1


def test_a_folder_without_a_dataset_is_refused_in_one_line(tmp_path):
    line = refusal("dali", "--data", str(tmp_path))
    assert line == f"loader_peers: no packed dataset in {tmp_path}: pack one with alexnet-train make-shards\n"


def test_a_crop_larger_than_the_packed_images_is_refused(packed):
    """The message is printed like that of a folder without a dataset."""
    with pytest.raises(ValueError, match=r"^a crop of 90 px does not fit in images of 80 px$"):
        Job(packed, batch=2, crop=90, threads=1).check()


def test_a_peer_that_cannot_run_gives_its_reason(tmp_path):
    job = Job(tmp_path, batch=2, crop=67, threads=1)
    with pytest.raises(
        PeerError, match=f"^dali: no packed dataset in {tmp_path}: pack one with alexnet-train make-shards$"
    ):
        Peer(Path(sys.executable), "dali", job, seconds=0.1)
    with pytest.raises(PeerError, match=r"^/nowhere/python does not run: No such file or directory$"):
        Peer(Path("/nowhere/python"), "dali", job, seconds=0.1)
