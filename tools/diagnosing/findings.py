"""What `alexnet-train doctor` finds, how it asks for it without waiting forever, and how it prints it."""

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from pipeline.documents import ContentError
from pipeline.manifest import DatasetError
from pipeline.remote_errors import reason_in_full
from trainer.run import RunError
from trainer.settings import SettingsError

# What training ends with in one line.
REFUSALS = (SettingsError, DatasetError, RunError, ContentError, OSError)
PROBE_SECONDS = 30.0  # for how long a probe is waited for
Status = Literal["ok", "note", "problem"]
_MARKS: dict[Status, str] = {"ok": " ", "note": "!", "problem": "✗"}
_SUBJECT = 12  # width of the first column
_WIDTHS = 60, 110  # the narrowest and the widest table, in characters


class Finding(NamedTuple):
    """What was found about one subject.

    status: `note` for what is worth knowing, and `problem` for what would stop a run. remedy: what to do.
    """

    subject: str
    text: str
    status: Status = "ok"
    remedy: str = ""


def problem(subject: str, error: Exception) -> Finding:
    """Return the finding for an error with which training would end; its message says what to do."""
    if isinstance(error, OSError):
        return Finding(subject, reason_in_full(error), "problem", "fix the cause")
    return Finding(subject, str(error), "problem")


def ask(
    subject: str, probe: Callable[[], Iterable[Finding]], seconds: float = PROBE_SECONDS
) -> list[Finding]:
    """Return the findings of a probe, or a problem if it fails or does not answer in time.

    The probe runs in a thread, because a storage or a driver that hangs may block it forever.
    """
    answers: queue.SimpleQueue[list[Finding] | BaseException] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put(list(probe()))
        except REFUSALS as error:
            answers.put([problem(subject, error)])
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=answer, name=subject, daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        text = f"no answer within {seconds:g} s"
        return [Finding(subject, text, "problem", "training would hang, too: look at `dmesg` for the cause")]
    if isinstance(found, BaseException):
        raise found
    return found


class Ended(NamedTuple):
    """How a program ended. code: its exit code, or −N after signal N; None if it did not end in time."""

    code: int | None
    output: str
    errors: str


def run_program(command: Sequence[str], seconds: float) -> Ended:
    """Run a program without input, and kill it with its children after `seconds`. Raises OSError.

    It is not waited for after that, because a process that hangs in a driver cannot be killed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            if code is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        return Ended(code, output.read(), errors.read())


class Report:
    """The findings by section, which are printed as a table while they arrive, unless `silent`."""

    def __init__(self, silent: bool = False):
        self.silent = silent
        self.findings: dict[str, list[Finding]] = {}

    def add(self, section: str, findings: Iterable[Finding]) -> None:
        """Add findings to a section, and print them under its title."""
        for finding in findings:
            if section not in self.findings:
                self.say(f"\n{section}" if self.findings else section)
            self.findings.setdefault(section, []).append(finding)
            self.say("\n".join(rows(finding)))

    def say(self, text: str) -> None:
        """Print text, unless the report is silent."""
        if not self.silent:
            print(text, flush=True)

    @property
    def problems(self) -> list[Finding]:
        """The findings that would stop a run."""
        return [each for found in self.findings.values() for each in found if each.status == "problem"]


def rows(finding: Finding) -> Iterator[str]:
    """Yield the lines of a finding: mark, subject and text, and on a line of its own what to do."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, _WIDTHS[0]), _WIDTHS[1])
    indent = " " * (_SUBJECT + 4)
    head = f"{_MARKS[finding.status]} {finding.subject:{_SUBJECT}}  "
    yield from _wrapped(finding.text, width, head, indent)
    if finding.remedy:
        arrow, below = f"{indent}→ ", f"{indent}  "
        yield from _wrapped(finding.remedy, width, arrow, below)


def size(count: float) -> str:
    """Format a number of bytes for people to read, such as 18.4 MB."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while count >= 1000 and len(units) > 1:
        count, _ = count / 1000, units.pop()
    return f"{count:.3g} {units[-1]}"


def _wrapped(text: str, width: int, first: str, below: str) -> list[str]:
    """Wrap a text at spaces only, so that commands and options stay whole."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=below,
        break_on_hyphens=False,
        break_long_words=False,
    )
