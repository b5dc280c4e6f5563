"""Small jobs for tests/endurance/faults.py, each in its own process, on storage where one call fails.

A job is a command with arguments, the folder whose calls are counted, and checks of its results. Thanks to a
fork server that has imported its modules, packing takes a tenth of a second.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.endurance.faulty_storage import SHORT, TWICE, Call, Fault, Storage
from tests.trees import contents

DEADLINE_SECONDS = 60  # a job that takes longer counts as hanging
_forkserver = multiprocessing.get_context("forkserver")
_preloaded = ["tools.make_shards", "tools.verify_shards", "tests.trees", "tests.endurance.faulty_storage"]


def preload(*modules: str) -> None:
    """Import modules in the fork server before the first job starts."""
    _preloaded.extend(modules)
    _forkserver.set_forkserver_preload(_preloaded)


preload()


@dataclass(frozen=True)
class Outcome:
    """The result of a job. code: exit code, or minus the number of a signal. text: everything it printed."""

    code: int
    text: str
    calls: dict[Call, int]
    hits: int

    def crashes(self) -> Iterator[str]:
        """Yield the violations of any job: death by a signal and a traceback."""
        if self.code < 0:
            yield f"ended by {signal.Signals(-self.code).name}: {self.text}"
        if "Traceback" in self.text:
            yield f"a traceback: {self.text}"


def live(job: Callable[..., None], arguments: Sequence[str], folder: Path, fault: Fault | None) -> Outcome:
    """Run a job on faulty storage, in its own process. folder: the folder whose calls are counted."""
    log = folder.with_suffix(".log")
    result, sender = _forkserver.Pipe(duplex=False)
    task = (job, arguments, folder, fault, log, sender)
    process = _forkserver.Process(target=_live, args=task, daemon=True)
    process.start()
    sender.close()
    try:
        calls, hits = result.recv()
    except EOFError:  # it was killed
        calls, hits = {}, 0
    process.join()
    text = log.read_text(errors="replace")
    log.unlink()
    assert process.exitcode is not None
    return Outcome(process.exitcode, text, calls, hits)


def _live(job, arguments, folder, fault, log, sender) -> None:
    signal.alarm(DEADLINE_SECONDS)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(written, descriptor)
    storage = Storage(folder, fault)
    try:
        with storage:
            job(arguments)
    finally:
        sender.send((dict(storage.calls), storage.hits))


def pack(arguments: Sequence[str]) -> None:
    """Run make_shards in this process, without workers and without pauses."""
    from pipeline import retry
    from pipeline.packing import executors
    from tools import make_shards

    retry.PAUSES, retry._EIO_PAUSES = (0.0, 0.0, 0.0), (0.0, 0.0)  # type: ignore[assignment]
    executors.processes = _here  # type: ignore[assignment]
    sys.argv = ["make_shards.py", *arguments]
    make_shards.main()


@contextmanager
def _here(count: int) -> Iterator:
    from pipeline.packing.executors import Executor
    from pipeline.packing.shard import pack_shard

    def submit(task):
        done: Future = Future()
        try:
            done.set_result(pack_shard(task))
        except Exception as error:
            done.set_exception(error)
        return done

    yield Executor(submit, lambda: count)


class Packing:
    """Packing of the pictures below `folder`, first undisturbed and then with faults."""

    def __init__(self, folder: Path):
        """folder: holds in/train/… and in/val/…"""
        self.folder, self.input, self.output = folder, folder / "in", folder / "out"
        self.arguments = ["--input", str(self.input), "--out", str(self.output), "--size", "16"]
        self.arguments += ["--shard-samples", "3", "--max-reject-ratio", "1"]
        undisturbed = live(pack, self.arguments, folder, None)
        assert undisturbed.code == 0, undisturbed.text
        self.calls, self.whole = undisturbed.calls, contents(self.output)

    def try_fault(self, fault: Fault) -> tuple[Outcome, list[str]]:
        """Run the job with a fault; return its outcome and the violations."""
        shutil.rmtree(self.output, ignore_errors=True)
        outcome = live(pack, self.arguments, self.folder, fault)
        wrong = list(self._judge(outcome, fault))
        rejected = self._rejected()
        again = live(pack, self.arguments, self.folder, None)
        is_refused = "already contains a dataset" in again.text
        if rejected:  # the dataset lacks a rejected file, and keeps lacking it
            if not is_refused:
                wrong.append(f"the same command after a rejection: code {again.code}: {again.text}")
        elif (again.code and not is_refused) or contents(self.output) != self.whole:
            wrong.append(f"the same command again gives another result: code {again.code}: {again.text}")
        return outcome, wrong

    def _judge(self, outcome: Outcome, fault: Fault) -> Iterator[str]:
        yield from outcome.crashes()
        if (self.output / "dataset.json").exists():
            yield from self._judge_dataset(fault)
        if outcome.code == 0 and not self._rejected():
            left = {name for name in contents(self.output) if not name.startswith(".packing/")}
            if left != self.whole.keys():
                yield f"code 0 with {sorted(left ^ self.whole.keys())} added or missing"
        if outcome.code > 0:
            yield from _judge_line(outcome.text, fault)

    def _judge_dataset(self, fault: Fault) -> Iterator[str]:
        from tools.verify_shards import verify

        if problems := verify(self.output, "all", 1).problems:
            yield f"a dataset that does not verify: {problems[0]}"
        for name in self._rejected():
            if not fault.call.path.endswith(name):
                yield f"{name} was rejected"

    def _rejected(self) -> list[str]:
        try:
            rows = [line.split("\t") for line in (self.output / "report.tsv").read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [name for name, outcome, _ in rows if outcome == "rejected"]


def _judge_line(text: str, fault: Fault) -> Iterator[str]:
    """Check that an error is one line with file and reason, apart from lines about retries."""
    lines = [
        line for line in text.splitlines() if "retrying for" not in line and "cannot be locked" not in line
    ]
    if len(lines) != 1:
        yield f"{len(lines)} lines: {text}"
    if fault.error not in (SHORT, TWICE) and os.strerror(getattr(errno, fault.error)) not in text:
        yield f"no reason: {text}"
    if fault.call.path.partition("*")[0].rstrip("/").rpartition("/")[2] not in text:
        yield f"no file: {text}"
