"""Other input pipelines, for `alexnet-train bench peers` to compare with.

    .loader-peers/bin/python -m tools.benchmarks.loader_peers pytorch --data shards

This script runs in its own environment (`make .loader-peers`); `dali` runs in the project's. After the first
batch it prints a line with versions. From then on it answers each line of stdin with one measurement,
{"images_per_second": …}, until stdin ends. So each peer is started only once, and all can be measured in turn
(see `Peer`).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from pipeline.machine import cpus
from pipeline.names import ROOT
from tools.benchmarks.peer_job import Job
from tools.benchmarks.peer_pipelines import PEERS
from tools.options import command_parser, count, positive

MODULE = f"{__package__}.loader_peers"
REPO = Path(__file__).resolve().parents[2]
LEAD_SECONDS = 1.0  # before each measurement


def rate(batches: Iterator[Any], seconds: float, device: str = "cpu") -> float:
    """Measure the images/s of batches `(images, labels)` for at least `seconds`, between two arrivals.

    Batches that were prefetched earlier are used up during LEAD_SECONDS, which are not measured. On a GPU
    ("cuda") a batch has arrived when the device has finished all its work.
    """
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    lead = time.perf_counter() + LEAD_SECONDS
    while next(batches) and time.perf_counter() < lead:
        pass
    finish()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[1])
    finish()
    return images / (time.perf_counter() - start)


class PeerError(RuntimeError):
    """A peer that cannot run; the message is one line."""


class Peer:
    """One of PEERS, in its own process group, run by the Python of its environment.

    It is stopped except during `measure()`; otherwise it would fill its queues during the next candidate's
    turn. Raises PeerError.
    """

    def __init__(self, python: Path, name: str, job: Job, seconds: float):
        if ROOT and str(python) != sys.executable:
            raise PeerError("another Python needs a checkout, whose modules it can import")
        self.name, self.seconds = name, seconds
        options = {"data": job.data.resolve(), "batch": job.batch, "crop": job.crop}
        options |= {"threads": job.threads, "device": job.device}
        command = [str(python), "-m", MODULE, name, f"--seconds={seconds}"]
        command += [f"--{option}={value}" for option, value in options.items()]
        command += ["--resized-crops"] * job.resized_crops
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close())
        self.process = self._start(command)
        self.versions: dict[str, str] = self._answer()["versions"]
        self._signal(signal.SIGSTOP)

    def _start(self, command: list[str]) -> subprocess.Popen:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            return subprocess.Popen(command, text=True, cwd=REPO, process_group=0, **pipes)
        except OSError as error:
            raise PeerError(f"{command[0]} does not run: {error.strerror}") from None

    def measure(self) -> float:
        """Return the images/s of one turn."""
        assert self.process.stdin
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer() reports its error
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer["images_per_second"]

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or [f"exit status {self.process.returncode}"]
        raise PeerError(f"{self.name}: {last[0].removeprefix('loader_peers: ')}")

    def close(self) -> None:
        """Let the process end normally, so that it ends its workers and deletes its files."""
        self._signal(signal.SIGCONT)
        self.process.communicate()
        self.errors.close()


def serve(name: str, job: Job, seconds: float, answers: IO[str]) -> None:
    """Write measurements to `answers`, one per line, as the module's docstring describes."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    job.check()
    pipeline, packages = PEERS[name]
    batches = pipeline(job)
    next(batches)
    answer(versions={package: version(package) for package in packages})
    for _ in sys.stdin:
        answer(images_per_second=rate(batches, seconds, job.device))
    batches.close()


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("peer", choices=PEERS, help="pipeline to run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="packed dataset")
    parser.add_argument("--batch", type=count, default=128, metavar="N", help="batch size (default 128)")
    parser.add_argument(
        "--crop",
        type=count,
        default=224,
        metavar="PX",
        help="side of the crop (default 224)",
    )
    parser.add_argument(
        "--threads",
        type=count,
        default=cpus(),
        metavar="N",
        help="number of threads or processes (default: one per CPU)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where batches are delivered",
    )
    parser.add_argument("--resized-crops", action="store_true", help="take random resized crops")
    parser.add_argument(
        "--seconds",
        type=positive,
        default=5.0,
        metavar="S",
        help="minimum length of a turn (default 5)",
    )
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages print to stdout
    try:
        with tempfile.TemporaryDirectory(prefix="loader-peers-") as scratch:
            work = options.data, options.batch, options.crop, options.threads, options.device
            job = Job(*work, Path(scratch), options.resized_crops)
            serve(options.peer, job, options.seconds, answers)
    except ImportError as error:
        sys.exit(
            f"loader_peers: {options.peer} is not installed in {sys.prefix}: {error}. Run make .loader-peers"
        )
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"loader_peers: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
