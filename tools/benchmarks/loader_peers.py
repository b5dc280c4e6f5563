"""Input pipelines as others build them, for `tools/bench.py` to measure beside ours.

    .loader-peers/bin/python -m tools.benchmarks.loader_peers pytorch --data shards

It runs in an environment of its own (`make .loader-peers`); `dali` runs in the project's. Once the
first batch is there, a line tells the versions. From then on each line of stdin is answered by one
measurement, {"images_per_second": …}, until stdin ends. In between a pipeline fills its queues and
stands still, so that all contestants can be started once and measured by turns: see `Contestant`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tools.benchmarks.peer_job import Job
from tools.benchmarks.peer_pipelines import PEERS

REPO = Path(__file__).resolve().parents[2]
LEAD_SECONDS = 1.0


def rate(batches: Iterator[Any], seconds: float, lead_seconds: float = LEAD_SECONDS) -> float:
    """Images/s of `(images, labels)` over at least `seconds`, from one batch's arrival to another's.

    What was prefetched before costs nothing now: it is used up in `lead_seconds`, which do not count.
    """
    lead = time.perf_counter() + lead_seconds
    while next(batches) and time.perf_counter() < lead:
        pass
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[1])
    return images / (time.perf_counter() - start)


class PeerError(RuntimeError):
    """A contestant that cannot run, in one line."""


class Contestant:
    """One of PEERS in a process of its own, under the Python of its environment.

    It works only within `measure()`, give or take the filling of its queues. Raises PeerError.
    """

    def __init__(self, python: Path, name: str, job: Job, seconds: float):
        self.name, self.seconds = name, seconds
        options = {"data": job.data.resolve(), "batch": job.batch, "crop": job.crop, "threads": job.threads}
        command = [str(python), "-m", "tools.benchmarks.loader_peers", name, f"--seconds={seconds}"]
        command += [f"--{option}={value}" for option, value in options.items()]
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close())
        self.process = self._start(command)
        self.versions: dict[str, str] = self._answer()["versions"]

    def _start(self, command: list[str]) -> subprocess.Popen:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            return subprocess.Popen(command, text=True, cwd=REPO, **pipes)
        except OSError as error:
            raise PeerError(f"{command[0]} does not run: {error.strerror}") from None

    def measure(self) -> float:
        """Images/s of one turn."""
        assert self.process.stdin
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say why
        return self._answer()["images_per_second"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or [f"exit status {self.process.returncode}"]
        raise PeerError(f"{self.name}: {last[0].removeprefix('loader_peers: ')}")

    def close(self) -> None:
        """Let it end by itself, its workers and its files with it."""
        self.process.communicate()
        self.errors.close()


def serve(name: str, job: Job, seconds: float, answers: IO[str]) -> None:
    """Answer on `answers`, a line each, as the module's docstring says."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    job.check()
    pipeline, packages = PEERS[name]
    batches = pipeline(job)
    next(batches)
    answer(versions={package: version(package) for package in packages})
    for _ in sys.stdin:
        answer(images_per_second=rate(batches, seconds))
    batches.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="packed by make-shards")
    parser.add_argument("--batch", type=int, default=128, metavar="N")
    parser.add_argument("--crop", type=int, default=224, metavar="PX")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, default=cores, metavar="N", help="or processes (default: cores)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="least length of a turn")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages print
    try:
        with tempfile.TemporaryDirectory(prefix="loader-peers-") as scratch:
            job = Job(options.data, options.batch, options.crop, options.threads, Path(scratch))
            serve(options.peer, job, options.seconds, answers)
    except ImportError as error:
        sys.exit(f"loader_peers: {options.peer} is not in {sys.prefix}: {error} (make .loader-peers)")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"loader_peers: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
