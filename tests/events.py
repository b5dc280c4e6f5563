"""Make a command do something at one of its own events, such as die, independently of time.

An event is a call by which the command, or a process that it has started, lists, opens, creates, renames or
deletes something in certain folders. Events are counted from 1 over all these processes, and the statement
for an event runs before it. Python's audit hooks see the events (PEP 578), and `sitecustomize`, which each
Python process imports at its start, installs the hook.
"""

import os
from pathlib import Path

from tests.helpers import DEADLINE_SECONDS

KILL_ALL = "signal_all(signal.SIGKILL)"  # the command and all processes that it has started
INTERRUPT_ALL = "signal_all(signal.SIGINT); hold()"  # like Ctrl-C in a terminal
KILL_THIS = "os.kill(os.getpid(), signal.SIGKILL)"  # the one process that reaches the event
HOLD = "hold()"  # wait there until killed

KINDS = ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")

_HOOK = """
import fcntl, os, re, signal, sys, threading, time

log, lock = os.open({log!r}, os.O_RDWR | os.O_APPEND | os.O_CREAT), threading.Lock()


def signal_all(number):
    assert os.getpgrp() != {group}, "the command needs a process group of its own: these are the tests"
    os.killpg(0, number)


def hold(until=None):
    end = time.monotonic() + {deadline}
    while not (until and os.path.exists(until)):
        if time.monotonic() > end:
            os._exit(86)
        time.sleep(0.01)


def hook(kind, arguments):
    paths = [str(path) for path in arguments[:2]] if kind in {kinds!r} else []
    line = " ".join([kind, *paths])
    if not any(path.startswith({roots!r}) for path in paths) or not re.match({only!r}, line):
        return
    with lock:
        fcntl.flock(log, fcntl.LOCK_EX)
        os.write(log, f"{{line}}\\n".encode())
        number = os.pread(log, os.fstat(log).st_size, 0).count(b"\\n")
        fcntl.flock(log, fcntl.LOCK_UN)
    if number in {numbers}:
        {statement}


sys.addaudithook(hook)
"""


def at_event(
    number: int | tuple[int, ...], statement: str, folder: Path, *roots: Path, only: str = ""
) -> dict[str, str]:
    """Return an environment in which a command executes a statement at event number `number`, or at several.

    folder: a new folder for the hook and its log. roots: the folders or files whose events are counted.
    only: a regular expression that the start of these events' lines in `events` must match. Event 0 never
    comes, so events are only logged. The statement may use `number`.
    """
    folder.mkdir()
    text = _HOOK.format(
        kinds=KINDS,
        log=str(folder / "events"),
        group=os.getpgrp(),
        deadline=DEADLINE_SECONDS,
        roots=tuple(map(str, roots)),
        only=only,
        numbers=number if isinstance(number, tuple) else (number,),
        statement=statement,
    )
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def events(folder: Path) -> list[str]:
    """Return the events that have happened, one per line: the kind of each and its paths."""
    log = folder / "events"
    return log.read_text().splitlines() if log.exists() else []


def at_picture(number: int, statement: str, folder: Path, pictures: Path) -> dict[str, str]:
    """Call `at_event` to count the pictures that are opened in a folder of splits and classes."""
    return at_event(number, statement, folder, *pictures.glob("*/*"), only="open ")
