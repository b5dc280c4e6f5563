"""Worker processes: their threads, and one-line errors if the system refuses them or they die."""

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


def threads_of_numpy() -> tuple[int, int]:
    """Return how many threads Python and the system count after a matrix product."""
    import numpy as np

    np.ones((300, 300)) @ np.ones((300, 300))
    return threading.active_count(), len(os.listdir("/proc/self/task"))  # noqa: PTH208


def thread_settings() -> list[str | None]:
    return [os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")]


def test_workers_use_one_blas_thread_and_the_command_keeps_its_setting(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with pool(1) as executor:
        assert executor.submit(thread_settings).result() == ["1", "1", "1"]
        python, system = executor.submit(threads_of_numpy).result()
    assert system == python  # BLAS has started none
    assert thread_settings() == [None, None, None]


def test_the_users_number_of_threads_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pool(1) as executor:
        assert executor.submit(thread_settings).result()[2] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def kill_yourself(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_signal_that_killed_a_worker_is_named():
    with pytest.raises(WorkersError, match=r"killed \(SIGKILL\).*fewer --workers"), pool(2) as executor:
        executor.submit(kill_yourself, signal.SIGKILL).result()


def use(count: int) -> None:
    """Use workers and report errors like the commands."""
    try:
        with translate_thread_errors(), pool(count) as executor:
            print(sum(executor.map(abs, range(100))))
    except WorkersError as error:
        sys.exit(f"use: {error}")


@pytest.fixture
def limited():
    """limited(limit, workers): run `use` with so many processes and threads; return its code and output."""
    group = PIDS / f"test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this system lets no control group be made: {error}")

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
def test_any_limit_of_processes_suffices_or_is_reported_in_one_line(limited, limit):
    code, output = limited(limit, 3)
    if code == 0:
        assert output == "4950\n"
        assert limit > 4
    else:
        assert code == 1
        assert output.startswith("use: the system allows no more processes or threads")
        assert output.count("\n") == 1, output
        assert limit < 13


def test_only_errors_of_starting_threads_are_taken_for_a_limit():
    with pytest.raises(RuntimeError, match="else"), translate_thread_errors():
        raise RuntimeError("else")
    with pytest.raises(WorkersError, match="ulimit -u"), translate_thread_errors():
        raise RuntimeError("can't start new thread")


def warn_twice() -> None:
    for text in ("one", "other"):
        warn(text)


def test_all_workers_together_print_a_message_once(capfd):
    with pool(2) as executor:
        for future in [executor.submit(warn_twice) for _ in range(6)]:
            future.result()
    assert capfd.readouterr().err.count("one") == 1


def test_a_message_is_repeated_after_a_while(capfd, monkeypatch):
    monkeypatch.setattr(workers, "_last_warning", workers._UnsharedArray([0.0]))
    warn_twice()
    monkeypatch.setattr(workers, "_WARNING_SECONDS", 0)
    warn_twice()
    assert [line.split(": ")[1] for line in capfd.readouterr().err.splitlines()] == ["one", "one", "other"]
