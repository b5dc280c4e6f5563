"""The progress that a run posts to Kubeflow Trainer, and that failures of its server change nothing."""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers import command, exact, free_port, main, wait_until
from tests.kubeflow import CA_FILE, TOKEN_FILE, StatusServer, status_server
from trainer.evaluate import Scores
from trainer.monitor import trainjob
from trainer.monitor.meter import Interval
from trainer.monitor.trainjob import TrainJob

# 10 steps of 128 images in 2 s.
INTERVAL = Interval(10, 1280, loss=2.5, error=0.5, seconds=2.0, wait_seconds=0.1, busy_seconds=1.9, ready=9)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StatusServer]:
    folder = tmp_path / "secrets"
    folder.mkdir()
    with status_server(folder) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def values(status: dict) -> dict[str, str]:
    return {metric["name"]: metric["value"] for metric in status["metrics"]}


def test_a_run_posts_its_progress_and_is_not_complete_before_its_last_evaluation(
    server, packed, whole, tmp_path, monkeypatch, capsys
):
    """The first requests fail, which is reported once."""
    monkeypatch.setattr(trainjob, "PERIOD_SECONDS", 0.02)
    server.failures = 2
    show = TrainJob.show_interval

    def show_and_wait(job: TrainJob, step: int, *rest: object) -> None:
        """Let the first three statuses, of which two fail, and the last interval's be posted."""
        show(job, step, *rest)
        if step in (1, 2, 3, 15):
            wait_until(lambda: job._pending is None)

    monkeypatch.setattr(TrainJob, "show_interval", show_and_wait)
    assert main(monkeypatch, command(packed, tmp_path / "run")) == 0
    assert server.refused == ["Internal error"] * 2
    assert capsys.readouterr().out.count("posting the progress to Kubeflow fails") == 1
    *earlier, last = server.taken
    percentages = [status["progressPercentage"] for status in earlier]
    assert percentages == sorted(percentages)
    assert percentages[0] < percentages[-1] <= 99
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    assert values(last).keys() == {"loss", "error", "learning_rate", "images_per_second"} | {
        f"validation_{name}" for name in ("loss", "top1_error", "top5_error")
    }
    assert exact(tmp_path / "run/metrics.csv") == exact(whole / "metrics.csv")


def test_the_time_left_is_that_of_the_remaining_steps(server):
    with TrainJob(1000, pytest.fail) as job:
        job.show_interval(250, 0.01, INTERVAL)
        job.show_evaluation(Scores(0.25, 0.0, 1.5, 20), with_top5=False)
    status = server.taken[-1]
    assert status["progressPercentage"] == 25
    assert status["estimatedRemainingSeconds"] == 750 * 2 / 10
    assert values(status) == {
        "loss": "2.5",
        "error": "0.5",
        "learning_rate": "0.01",
        "images_per_second": "640",
        "validation_loss": "1.5",
        "validation_top1_error": "0.25",
    }


def test_requests_are_rare_and_the_newest_status_is_posted_with_the_token_of_that_time(server, monkeypatch):
    monkeypatch.setattr(trainjob, "PERIOD_SECONDS", 0.5)
    with TrainJob(1000, pytest.fail) as job:
        job.show_interval(100, 0.01, INTERVAL)
        wait_until(lambda: server.taken)
        (server.folder / TOKEN_FILE).write_text("second\n")
        for step in range(200, 300):
            job.show_interval(step, 0.01, INTERVAL)
    assert [status["progressPercentage"] for status in server.taken] == [10, 29]


def spoil(case: str, server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    match case:
        case "refused":
            monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:{free_port()}/status")
        case "not a URL":
            monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "nonsense")
        case "token is not set":
            monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_TOKEN")
        case "no token":
            (server.folder / TOKEN_FILE).unlink()
        case "wrong authority":
            other = server.folder / "other"
            other.mkdir()
            with status_server(other):
                (server.folder / CA_FILE).write_bytes((other / CA_FILE).read_bytes())
        case "hangs":
            server.is_hanging = True
        case "HTTP 500":
            server.failures = 1000


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("refused", "Connection refused"),
        ("not a URL", ""),
        ("token is not set", "KUBEFLOW_TRAINER_SERVER_TOKEN is not set"),
        ("no token", "No such file"),
        ("wrong authority", "CERTIFICATE_VERIFY_FAILED"),
        ("hangs", "timed out"),
        ("HTTP 500", "HTTP 500: .*Internal error"),
    ],
)
def test_a_failure_is_reported_once_and_delays_nothing(server, monkeypatch, case, message):
    monkeypatch.setattr(trainjob, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(trainjob, "TIMEOUT_SECONDS", 1.0 if case == "hangs" else 60.0)
    spoil(case, server, monkeypatch)
    warnings: list[str] = []
    with TrainJob(1000, warnings.append) as job:
        for step in range(10, 500, 10):
            begun = time.monotonic()
            job.show_interval(step, 0.01, INTERVAL)
            assert time.monotonic() - begun < 0.9  # less than a request that hangs
            time.sleep(0.001)
    (warning,) = warnings
    assert warning.startswith("posting the progress to Kubeflow fails, and will be tried again: ")
    assert re.search(message, warning)


def test_other_processes_and_runs_outside_kubeflow_post_nothing(server, monkeypatch):
    with TrainJob(1000, pytest.fail, silent=True) as job:
        job.complete()
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL")
    with TrainJob(1000, pytest.fail) as job:
        job.complete()
    assert server.taken == server.refused == []


def test_a_run_that_ends_early_does_not_wait_for_the_server(server):
    server.is_hanging = True
    begun = time.monotonic()
    with suppress(KeyboardInterrupt), TrainJob(1000, lambda _: None) as job:
        job.show_interval(10, 0.01, INTERVAL)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < trainjob.TIMEOUT_SECONDS
