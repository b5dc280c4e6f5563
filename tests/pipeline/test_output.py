"""Output that cannot be written does not end the work, but is an error if it is the result."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import output
from tests.helpers import REPO

# Writes its result to a file and prints lines that nobody may read.
WORK = """
import sys
from pipeline.output import secure
secure()
result = open(sys.argv[1], "w")
for number in range(2000):
    print("café × line", number, flush=number % 100 == 0)
    print("warning \\udcff", number, file=sys.stderr)
result.write("done")
"""
RESULT = """
import sys
from pipeline.output import printed, secure
secure()
try:
    with printed():
        print("1.5" * 10000)
except OSError as error:
    sys.exit(f"{error.filename}: {error.strerror}")
"""
BAR = """
import sys, time
from rich.console import Console
from rich.progress import Progress
from pipeline.output import secure
secure()
with Progress(console=Console(force_terminal=True)) as bar:
    task = bar.add_task("work")
    for number in range(50):
        bar.update(task, completed=number)
        bar.console.print("line", number)
        print("warning", file=sys.stderr)
        time.sleep(0.01)
open(sys.argv[1], "w").write("done")
"""


def run(script: str, redirection: str, result: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a script under a shell's redirection."""
    command = f'set -o pipefail; "$0" -c "$1" "$2" {redirection}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, script, str(result)],
        cwd=REPO,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", [WORK, BAR])
@pytest.mark.parametrize(
    "redirection",
    ["| true", "| head -1", ">/dev/full", ">/dev/full 2>&1", "2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-"],
)
def test_work_goes_on_without_its_output(script, redirection, tmp_path):
    done = run(script, redirection, tmp_path / "result")
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "done")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8:strict", "cp1252"])
def test_text_that_the_encoding_cannot_represent_does_no_harm(encoding, tmp_path):
    done = run(WORK, "", tmp_path / "result", PYTHONIOENCODING=encoding)
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "done")
    assert "line 1999" in done.stdout


def test_the_loss_of_output_is_reported_once(tmp_path):
    done = run(WORK, ">/dev/full", tmp_path / "result")
    assert done.stderr.count("standard output cannot be written (ENOSPC): the work goes on without it") == 1


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("| true", 128 + signal.SIGPIPE, ""),
        (">/dev/full", 1, "standard output: No space left on device"),
        (">&-", 1, "standard output: Bad file descriptor"),
    ],
)
def test_a_result_that_cannot_be_printed_is_an_error_unless_its_reader_has_gone(
    redirection, code, message, tmp_path
):
    done = run(RESULT, redirection, tmp_path)
    assert (done.returncode, done.stderr.strip()) == (code, message)


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize(("redirection", "code"), [("| true", 128 + signal.SIGPIPE), (">/dev/full", 1)])
def test_help_ends_quietly_without_a_reader(option, redirection, code):
    command = f"set -o pipefail; {sys.executable} -m tools.command {option} {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_terminal_that_goes_away_does_not_end_the_work(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", BAR, str(tmp_path / "result")]
    process = subprocess.Popen(command, cwd=REPO, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "result").read_text() == "done"


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe that is full, because its reader has stopped reading."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_a_reader_that_reads_nothing_is_waited_for_only_once(full_pipe):
    waits = []
    reading, writing = full_pipe
    stream = output._Stream(writing, "standard output")

    class Poll:
        def poll(self, milliseconds):
            waits.append(milliseconds)
            return poll.poll(0)

    poll, stream._poll = stream._poll, Poll()
    assert [stream.write(b"a line\n") for _ in range(3)] == [7, 7, 7]
    assert waits == [output.PATIENCE_SECONDS * 1e3, 0.0, 0.0]
    os.read(reading, 1 << 16)
    stream.write(b"later\n")
    assert os.read(reading, 1 << 16).endswith(b"later\n")


def test_a_slow_reader_gets_all_of_a_long_text(tmp_path):
    script = "from pipeline.output import secure; secure(); print('x' * 300000); print('end')"
    done = run(script, "| (sleep 0.5; cat)", tmp_path)
    assert done.stdout == "x" * 300000 + "\nend\n"
