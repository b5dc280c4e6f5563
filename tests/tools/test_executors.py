"""Who packs makes no difference to the bytes, and one that vanishes costs nothing but time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.shards import INDEX_DTYPE
from tools.make_shards import pack, parse_arguments
from tools.packing import executors
from tools.packing.executors import Counts, Crew, run_tasks
from tools.packing.pixel_sums import PixelSums
from tools.packing.progress import Progress
from tools.packing.results import SUFFIX, Result
from tools.packing.shard import PackingError
from tools.storage import UNFINISHED

REPO = Path(__file__).resolve().parents[2]
SETTINGS = ("--size", "448", "--shard-samples", "4")  # large pictures, 20 shards: there is time to kill
SHARDS = 20


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(output: Path) -> int:
    return len(list((output / UNFINISHED).glob(f"*{SUFFIX}")))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(pictures, make_shards, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole")
    run = make_shards(pictures, output, *SETTINGS, "--workers", "2")
    assert run.returncode == 0, run.stderr
    return content(output)


def packing(source: Path, output: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *SETTINGS, *arguments], cwd=REPO, **pipes)


def worker_processes(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# By threads of this process: what run_tasks itself does.


def result_of(number: int) -> Result:
    return Result(None, np.zeros(number, INDEX_DTYPE), PixelSums(), [("a", "rejected", "empty")])


def crew_of(pool: ThreadPoolExecutor, work) -> Crew:
    return Crew(lambda task: pool.submit(work, task), lambda: 2)


def test_results_come_in_the_order_of_the_tasks_however_they_end():
    late = threading.Event()

    def work(number: int) -> Result:
        if number == 0:
            assert late.wait(30)
        elif number == 9:
            late.set()
        return result_of(number)

    shown = []
    with ThreadPoolExecutor(2) as pool:
        crew = crew_of(pool, work)
        results = run_tasks(range(10), crew, lambda counts: shown.append(counts.images))
    assert [len(result.rows) for result in results] == list(range(10))
    assert shown == sorted(shown)
    assert shown[-1] == sum(range(10)) + 10  # the rejected ones, too


def test_no_more_tasks_are_handed_out_than_keep_all_busy():
    held, most = [], 0

    def submit(task) -> Future:
        nonlocal most
        held.append(Future())
        most = max(most, sum(not future.done() for future in held))
        if len(held) % 4 == 0 or len(held) == 10:
            for future in held:
                if not future.done():
                    future.set_result(result_of(1))
        return held[-1]

    assert len(run_tasks(range(10), Crew(submit, lambda: 2), lambda counts: None)) == 10
    assert most == 4


def test_an_error_ends_the_run_before_further_tasks_begin():
    begun = []

    def work(number: int) -> Result:
        begun.append(number)
        if number == 1:
            raise OSError(28, "No space left on device")
        time.sleep(0.01)
        return result_of(number)

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="No space left"):
        run_tasks(range(100), crew_of(pool, work), lambda counts: None)
    assert len(begun) < 100


def test_nothing_to_do_is_done():
    assert run_tasks([], Crew(lambda task: 1 / 0, lambda: 2), lambda counts: None) == []


# By processes.


def test_images_are_counted_while_a_shard_is_under_way(pictures, tmp_path):
    seen: list[Counts] = []

    class Recorder(Progress):
        def show(self, counts: Counts) -> None:
            seen.append(counts)
            super().show(counts)

    progress = Recorder()
    where = ["--input", str(pictures), "--output", str(tmp_path), "--workers", "1", "--size", "1024"]
    manifest = pack(parse_arguments(where), progress)  # two shards
    assert len({counts.images for counts in seen}) > 3
    last = seen[-1]
    rows = [np.load(tmp_path / split.index) for split in manifest.splits.values()]
    assert last == Counts(80, sum(int(part["size"].sum()) for part in rows), 0)


def test_a_worker_killed_is_named_and_the_same_command_continues(pictures, whole, tmp_path):
    process = packing(pictures, tmp_path, "--workers", "2")
    wait_until(lambda: records(tmp_path) >= 2)
    os.kill(worker_processes(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("make_shards: a worker process was killed (SIGKILL)")
    assert "fewer --workers" in errors
    assert "the same command continues" in errors
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert kept
    process = packing(pictures, tmp_path, "--workers", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert content(tmp_path) == whole
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert sum(now[name] == time for name, time in kept.items()) >= len(kept) - 2  # those amid their record


def test_how_a_worker_ended_is_said():
    class Process:
        def __init__(self, exitcode: int | None):
            self.exitcode = exitcode

    assert "SIGSEGV" in executors._end([Process(-15), Process(-11), Process(0)])
    assert "exit code 3" in executors._end([Process(-15), Process(3), Process(None)])


def test_ctrl_c_ends_the_command_and_its_workers_without_a_traceback(pictures, tmp_path):
    for attempt in range(5):
        output = tmp_path / str(attempt)
        command = [sys.executable, "tools/make_shards.py", "--input", str(pictures), "--output", str(output)]
        with subprocess.Popen(
            [*command, *SETTINGS, "--workers", "2"],
            cwd=REPO,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            wait_until(lambda o=output, p=process: records(o) >= 1 or p.poll() is not None)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, errors = process.communicate(timeout=60)
        if process.returncode:  # otherwise it was through before the signal came, on a busy machine
            break
    assert process.returncode == 130
    assert "Traceback" not in errors


# By a Dask cluster.


class Cluster(NamedTuple):
    """All in processes of their own."""

    address: str
    scheduler: subprocess.Popen
    workers: list[subprocess.Popen]


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    pytest.importorskip("distributed", reason="needs the extra `dask`")
    file, local = tmp_path / "scheduler.json", tmp_path / "dask"

    def dask(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(file), "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--host", "127.0.0.1"], cwd=tmp_path, **quiet)

    worker = ("worker", "--no-nanny", "--nthreads", "1", "--local-directory", str(local))
    processes = [dask("scheduler", "--port", "0"), *(dask(*worker) for _ in range(3))]
    try:
        wait_until(file.exists)
        yield Cluster(json.loads(file.read_text())["address"], processes[0], processes[1:])
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_packs_the_same_bytes(pictures, whole, cluster, tmp_path):
    output = tmp_path / "out"
    process = packing(pictures, output, "--executor", "dask", "--scheduler", cluster.address)
    wait_until(lambda: records(output) >= 3)
    assert records(output) < SHARDS
    cluster.workers[0].kill()
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.startswith("80 images (60 train, 20 val)")
    assert content(output) == whole
    assert [worker.poll() for worker in cluster.workers[1:]] == [None, None]  # the cluster stays


@pytest.mark.slow
def test_a_dask_scheduler_that_goes_away_is_named_and_processes_may_continue(
    pictures, whole, cluster, tmp_path, make_shards
):
    output = tmp_path / "out"
    process = packing(pictures, output, "--executor", "dask", "--scheduler", cluster.address)
    wait_until(lambda: records(output) >= 3)
    cluster.scheduler.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"make_shards: the Dask scheduler at {cluster.address} went away")
    run = make_shards(pictures, output, *SETTINGS, "--workers", "2")
    assert run.returncode == 0, run.stderr
    assert content(output) == whole


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere://"])
def test_a_scheduler_that_is_not_there_is_one_line(address):
    pytest.importorskip("distributed", reason="needs the extra `dask`")
    import dask  # whose settings are whole only now

    refused = pytest.raises(PackingError, match=f"--scheduler {address}")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), refused, executors.dask(address):
        pass


def test_dask_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PackingError, match=r"pip install 'alexnet-train\[dask\]'"), executors.dask("tcp://h"):
        pass
