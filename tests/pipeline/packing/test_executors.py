"""The bytes do not depend on who packs, and a packer that is lost costs nothing but time."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.packing import executors, workers
from pipeline.packing.executors import Counts, Executor, run_tasks
from pipeline.packing.progress import Progress
from pipeline.packing.shard import PackingError
from pipeline.packing.shard_results import SUFFIX, ShardResult
from pipeline.packing.statistics import PixelSums
from pipeline.packing.storage import STATE_FOLDER
from pipeline.shards import INDEX_DTYPE, checksum_array
from tests.events import INTERRUPT_ALL, KILL_THIS, at_picture
from tests.helpers import DEADLINE_SECONDS, wait_until
from tests.trees import contents
from tools.make_shards import pack, parse_arguments

SETTINGS = ("--size", "64", "--shard-samples", "4")
SHARDS = 20


def records(output: Path) -> int:
    return len(list((output / STATE_FOLDER).glob(f"*{SUFFIX}")))


@pytest.fixture(scope="module")
def whole(pictures, make_shards, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole")
    make_shards(pictures, output, *SETTINGS, "--workers", "2")
    return contents(output)


@pytest.fixture
def packing(make_shards, pictures) -> Callable[..., tuple[str, str]]:
    """Run the command with the settings of these tests; return its output and errors."""

    def run(output: Path, *arguments: str, **options) -> tuple[str, str]:
        done = make_shards(pictures, output, *SETTINGS, *arguments, **options)
        return done.stdout, done.stderr

    return run


# run_tasks with threads of this process.


def result_of(number: int) -> ShardResult:
    return ShardResult(
        None, np.zeros(number, INDEX_DTYPE), checksum_array([]), PixelSums(), [("a", "rejected", "empty")]
    )


def executor_of(pool: ThreadPoolExecutor, work) -> Executor:
    return Executor(lambda task: pool.submit(work, task), lambda: 2)


def test_results_have_the_order_of_the_tasks_whatever_ends_first():
    late = threading.Event()

    def work(number: int) -> ShardResult:
        if number == 0:
            assert late.wait(DEADLINE_SECONDS)
        elif number == 9:
            late.set()
        return result_of(number)

    shown = []
    with ThreadPoolExecutor(2) as pool:
        executor = executor_of(pool, work)
        results = run_tasks(range(10), executor, lambda counts: shown.append(counts.images))
    assert [len(result.rows) for result in results] == list(range(10))
    assert shown == sorted(shown)
    assert shown[-1] == sum(range(10)) + 10  # including the rejected ones


def test_only_as_many_tasks_are_submitted_as_keep_all_workers_busy():
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

    assert len(run_tasks(range(10), Executor(submit, lambda: 2), lambda counts: None)) == 10
    assert most == 4


def test_an_error_ends_the_run_before_further_tasks_begin():
    begun = []

    def work(number: int) -> ShardResult:
        begun.append(number)
        if number == 1:
            raise OSError(28, "No space left on device")
        return result_of(number)

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="No space left"):
        run_tasks(range(100), executor_of(pool, work), lambda counts: None)
    assert len(begun) <= 5  # four are handed out at first, and another when the first is done


def test_without_tasks_there_are_no_results():
    assert run_tasks([], Executor(lambda task: 1 / 0, lambda: 2), lambda counts: None) == []


# Processes.


def test_images_are_counted_before_their_shard_is_finished(pictures, tmp_path, monkeypatch):
    """The worker waits at its 31st picture of 60 until the 30 before it are shown."""
    output, shown = tmp_path / "out", tmp_path / "shown"
    opened = at_picture(31, f"hold({str(shown)!r})", tmp_path / "events", pictures)
    monkeypatch.setenv("PYTHONPATH", opened["PYTHONPATH"])
    seen: list[Counts] = []

    class Recorder(Progress):
        def show(self, counts: Counts) -> None:
            seen.append(counts)
            super().show(counts)
            if counts.images == 30:
                shown.touch()

    where = ["--input", str(pictures), "--out", str(output), "--workers", "1", "--size", "64"]
    manifest = pack(parse_arguments(where).packing, Recorder())  # two shards
    assert shown.exists()
    assert [counts.images for counts in seen] == sorted(counts.images for counts in seen)
    rows = [np.load(output / split.index) for split in manifest.splits.values()]
    assert seen[-1] == Counts(80, sum(int(part["size"].sum()) for part in rows), 0)


def test_a_killed_worker_is_named_and_the_same_command_continues(packing, pictures, whole, tmp_path):
    # At the 21st picture, two workers have finished at least three shards of four pictures.
    output, dies = tmp_path / "out", at_picture(21, KILL_THIS, tmp_path / "events", pictures)
    _, errors = packing(output, "--workers", "2", code=1, **dies)
    assert errors.startswith("make-shards: a worker process was killed (SIGKILL)")
    assert "fewer --workers" in errors
    assert "run the same command again to continue" in errors
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert 3 <= len(kept) < SHARDS
    packing(output, "--workers", "2")
    assert contents(output) == whole
    now = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    # The two workers may have died before they wrote the records of their last shards.
    assert sum(now[name] == time for name, time in kept.items()) >= len(kept) - 2


def test_the_end_of_a_worker_is_described():
    class Process:
        def __init__(self, exitcode: int | None):
            self.exitcode = exitcode

    assert "SIGSEGV" in workers._describe_death([Process(-15), Process(-11), Process(0)])
    assert "exit code 3" in workers._describe_death([Process(-15), Process(3), Process(None)])


def test_ctrl_c_ends_the_command_and_its_workers_without_a_traceback(packing, pictures, tmp_path):
    """The worker that sends the signal waits, so the command cannot finish first."""
    interrupted = at_picture(21, INTERRUPT_ALL, tmp_path / "events", pictures)
    _, errors = packing(tmp_path / "out", "--workers", "2", code=130, **interrupted)
    assert "Traceback" not in errors
    assert 0 < records(tmp_path / "out") < SHARDS


# A Dask cluster.


class Cluster:
    """A scheduler and workers, each in its own process, which `close` kills."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "scheduler.json"
        self.address = ""
        self.processes: list[subprocess.Popen] = []

    def start_scheduler(self) -> None:
        self.start({}, "scheduler", "--port", "0")
        wait_until(self._knows_address, self.processes[0])

    def _knows_address(self) -> bool:
        try:
            self.address = json.loads(self.file.read_text())["address"]
        except (FileNotFoundError, json.JSONDecodeError):  # not written, or not to its end
            return False
        return True

    def start(self, environment: dict[str, str], *arguments: str) -> None:
        shared = ("--scheduler-file", str(self.file), "--no-dashboard", "--host", "127.0.0.1")
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, *shared],
                cwd=self.folder,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def start_workers(self, *environments: dict[str, str]) -> None:
        """Start a worker with each environment, and wait until the scheduler knows them."""
        from distributed import Client

        for environment in environments:
            local = ("--local-directory", str(self.folder / "dask"))
            self.start(environment, "worker", "--no-nanny", "--nthreads", "1", *local)
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(len(environments), timeout=DEADLINE_SECONDS)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    pytest.importorskip("distributed", reason="needs the extra `dask`")
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.start_scheduler()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_packs_the_same_bytes(packing, pictures, whole, cluster, tmp_path):
    """The worker dies at the third picture of four of its first shard."""
    output = tmp_path / "out"
    cluster.start_workers(at_picture(3, KILL_THIS, tmp_path / "events", pictures), {}, {})
    printed, _ = packing(output, "--executor", "dask", "--scheduler", cluster.address)
    assert printed.startswith("80 images (60 train, 20 val)")
    assert contents(output) == whole
    _, lost, *others = cluster.processes
    assert lost.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    assert [worker.poll() for worker in others] == [None, None]  # the cluster is left running


@pytest.mark.slow
def test_a_lost_dask_scheduler_is_named_and_local_processes_can_continue(
    packing, pictures, whole, cluster, tmp_path
):
    """A worker kills it at the 13th picture, when three workers have finished at least one shard of four."""
    output, scheduler = tmp_path / "out", cluster.processes[0]
    kill = f"os.kill({scheduler.pid}, signal.SIGKILL)"
    cluster.start_workers(*[at_picture(13, kill, tmp_path / "events", pictures)] * 3)
    _, errors = packing(output, "--executor", "dask", "--scheduler", cluster.address, code=1)
    assert scheduler.wait(DEADLINE_SECONDS) == -signal.SIGKILL
    last = errors.splitlines()[-1]
    assert last.startswith(f"make-shards: the connection to the Dask scheduler at {cluster.address} was lost")
    for worker in cluster.processes[1:]:
        worker.kill()  # it would finish its shard
        worker.wait()
    assert 0 < records(output) < SHARDS
    printed, _ = packing(output, "--workers", "2")
    assert "were packed by earlier runs" in printed.splitlines()[0]
    assert contents(output) == whole


@pytest.mark.slow
def test_a_dask_scheduler_that_is_lost_while_it_counts_its_workers_is_named(cluster, monkeypatch):
    """The question fails before the client has noticed the loss, so its status is still "running"."""
    from distributed import Client
    from distributed.comm import CommClosedError

    def break_off(client: Client) -> dict[str, int]:
        assert client.status == "running"
        raise CommClosedError(f"in <TCP (closed) ConnectionPool.ncores remote={cluster.address}>")

    monkeypatch.setattr(Client, "ncores", break_off)
    lost = pytest.raises(PackingError, match=f"Dask scheduler at {cluster.address} was lost")
    with lost, executors.dask(cluster.address) as executor:
        executor.concurrency()


@pytest.mark.slow
def test_what_the_system_refuses_to_a_dask_worker_is_not_taken_for_a_lost_scheduler(cluster, monkeypatch):
    monkeypatch.setattr(executors, "pack_shard", open)
    cluster.start_workers({})
    with pytest.raises(FileNotFoundError, match="missing"), executors.dask(cluster.address) as executor:
        executor.submit(cluster.folder / "missing").result(DEADLINE_SECONDS)


@pytest.mark.slow
def test_a_dask_cluster_without_this_package_or_without_workers_is_named(
    cluster, tmp_path, monkeypatch, capsys
):
    (tmp_path / "only_here.py").write_text("def pack(task): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(executors, "pack_shard", importlib.import_module("only_here").pack)
    lacks = pytest.raises(PackingError, match=r"need the version of alexnet-train .*: install it there")
    with lacks, executors.dask(cluster.address) as executor:
        assert [executor.concurrency() for _ in range(3)] == [1] * 3
        executor.submit(None).result(DEADLINE_SECONDS)
    assert capsys.readouterr().err.count(f"waiting for a Dask worker: {cluster.address} has none\n") == 1


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere://"])
def test_an_unreachable_scheduler_is_named(address):
    pytest.importorskip("distributed", reason="needs the extra `dask`")
    import dask  # its settings are complete only after distributed was imported

    refused = pytest.raises(PackingError, match=f"--scheduler {address}")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), refused, executors.dask(address):
        pass


def test_without_dask_the_message_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PackingError, match=r"pip install 'alexnet-train\[dask\]'"), executors.dask("tcp://h"):
        pass


def test_an_address_of_a_dask_scheduler_that_is_none_is_refused_at_once(monkeypatch):
    """Its client would try to close for a minute, and then print a traceback."""
    distributed = pytest.importorskip("distributed", reason="needs the extra `dask`")
    monkeypatch.setattr(distributed, "Client", pytest.fail)
    refused = pytest.raises(PackingError, match="--scheduler nonsense cannot be reached: missing port number")
    with refused, executors.dask("nonsense"):
        pass
