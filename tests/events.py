"""Have a command do something at a certain event of its own, such as die: no clock takes part.

An event is a call by which the command, or a process that it has started, lists, opens, creates, renames
or deletes something in certain folders. Events are counted over all these processes, from 1, and what is
to happen at one happens before it. Python's audit hooks see them (PEP 578), and `sitecustomize`, which
each Python process imports at its start, installs the hook.
"""

import os
from pathlib import Path

from tests.helpers import DEADLINE_SECONDS

KILL_ALL = "signal_all(signal.SIGKILL)"  # the command and all processes that it has started
INTERRUPT_ALL = "signal_all(signal.SIGINT); hold()"  # as Ctrl-C in a terminal does
KILL_THIS = "os.kill(os.getpid(), signal.SIGKILL)"  # the one process that comes to the event
HOLD = "hold()"  # it goes no further, and has to be killed

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
    """The environment with which a command executes a statement at its event of that number, or of those.

    folder: a new one, for the hook and its log. roots: the folders or files of which events are counted, and
    only: how these begin, as a regular expression for lines of `events`. At event 0, which never comes,
    events are only logged. The statement may use `number`.
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
    """What has happened, an event a line: its kind and the paths that it is about."""
    log = folder / "events"
    return log.read_text().splitlines() if log.exists() else []


def at_picture(number: int, statement: str, folder: Path, pictures: Path) -> dict[str, str]:
    """The same with the pictures that are opened, of a folder of splits with folders of classes."""
    return at_event(number, statement, folder, *pictures.glob("*/*"), only="open ")
