"""Worker processes: their threads, and one line where the system refuses them or they die."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.packing import workers
from pipeline.packing.workers import WorkersError, pool, translate_thread_errors, warn
from tests.helpers import REPO, wait_until

PIDS = Path("/sys/fs/cgroup/pids")


def threads_of_numpy() -> int:
    import numpy as np

    np.ones((300, 300)) @ np.ones((300, 300))
    return threading.active_count(), len(os.listdir("/proc/self/task"))  # noqa: PTH208


def numbers() -> list[str | None]:
    return [os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")]


def test_workers_have_one_thread_of_blas_and_the_command_keeps_its_own(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with pool(1) as executor:
        assert executor.submit(numbers).result() == ["1", "1", "1"]
        python, system = executor.submit(threads_of_numpy).result()
    assert system == python  # BLAS has started none
    assert numbers() == [None, None, None]


def test_what_the_user_sets_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pool(1) as executor:
        assert executor.submit(numbers).result()[2] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def kill_yourself(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_worker_that_dies_is_named():
    with pytest.raises(WorkersError, match=r"killed \(SIGKILL\).*fewer --workers"), pool(2) as executor:
        executor.submit(kill_yourself, signal.SIGKILL).result()


def use(count: int) -> None:
    """With errors as the commands tell of them."""
    try:
        with translate_thread_errors(), pool(count) as executor:
            print(sum(executor.map(abs, range(100))))
    except WorkersError as error:
        sys.exit(f"use: {error}")


@pytest.fixture
def limited():
    """limited(most processes and threads, workers): what such a command prints, and its exit code."""
    group = PIDS / f"test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")

    def run(limit: int, count: int) -> tuple[int, str]:
        (group / "pids.max").write_text(str(limit))
        code = f"open('{group}/cgroup.procs', 'w').write('0')\nfrom {__name__} import use\n"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\nif __name__ == '__main__':\n    use({count})"],
            cwd=REPO,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout

    yield run
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(1, 14))
def test_however_few_processes_are_allowed_it_is_one_line_or_none_too_few(limited, limit):
    code, output = limited(limit, 3)
    if code == 0:
        assert output == "4950\n"
        assert limit > 4
    else:
        assert code == 1
        assert output.startswith("use: the system allows no more processes or threads")
        assert output.count("\n") == 1, output
        assert limit < 13


def test_only_refused_threads_are_taken_for_a_limit():
    with pytest.raises(RuntimeError, match="else"), translate_thread_errors():
        raise RuntimeError("else")
    with pytest.raises(WorkersError, match="ulimit -u"), translate_thread_errors():
        raise RuntimeError("can't start new thread")


def warn_twice() -> None:
    for text in ("one", "other"):
        warn(text)


def test_one_line_for_all_workers(capfd):
    with pool(2) as executor:
        for future in [executor.submit(warn_twice) for _ in range(6)]:
            future.result()
    assert capfd.readouterr().err.count("one") == 1


def test_something_is_said_again_after_a_while(capfd, monkeypatch):
    monkeypatch.setattr(workers, "_last_warning", workers._UnsharedArray([0.0]))
    warn_twice()
    monkeypatch.setattr(workers, "_WARNING_SECONDS", 0)
    warn_twice()
    assert [line.split(": ")[1] for line in capfd.readouterr().err.splitlines()] == ["one", "one", "other"]
