"""Start the processes of a run on one machine, one for each GPU.

They find their ranks in the environment, as if torchrun had started them. Unlike torchrun, `launch` returns
the run's own exit code, prints an error once instead of once per process, and restarts the processes only if
that may help: after one was killed, crashed or stalled. A process that rejected a setting or its data would
do so again.

Each process has its own process group. Ctrl-C therefore reaches only the launching process, which passes it
on once. When the launching process ends, for whatever reason, the kernel kills the others.
"""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from pipeline.machine import cpus
from trainer.processes.ranks import read_ranks
from trainer.processes.stop import SIGNALS, StopRequest
from trainer.processes.watchdog import EXIT_STALLED
from trainer.settings import Settings, SettingsError

GRACE_SECONDS = 30.0  # time for the others to end after one has failed; they may be saving a checkpoint
_POLL_SECONDS = 0.1
_STOPPED = {128 + number for number in SIGNALS}  # exit codes of a process that was asked to stop
_ERRORS_FD = "ERRORS_FD"  # environment variable: the file descriptor for a process's error messages
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LIBC = ctypes.CDLL(None)


def world_size(settings: Settings) -> int:
    """Return the number of processes of the run, which torchrun has started or this machine will start.

    Raises SettingsError if the settings or the variables of torchrun do not allow that number.
    """
    wanted, one_gpu, ranks = settings.processes, ":" in settings.device, read_ranks()
    if ranks.is_launched:
        local = ranks.local_world_size
        if wanted and wanted != local:
            raise SettingsError(f"--processes {wanted}: torchrun has started {local} here; omit --processes")
        if one_gpu and local != 1:
            raise SettingsError(
                f"--device {settings.device}: torchrun has started {local} here, each of which needs a GPU; "
                "use --device cuda"
            )
        _check_ports(settings.port, local)
        return ranks.world_size
    gpus = 0 if settings.device == "cpu" else 1 if one_gpu else count_gpus()
    if gpus and wanted and wanted > gpus:
        raise SettingsError(
            f"--processes {wanted}: each process needs a GPU; with --device {settings.device}, use {gpus}"
        )
    local = wanted or gpus or 1
    _check_ports(settings.port, local)
    return local


def _check_ports(first: int, processes: int) -> None:
    """Raise SettingsError if the last process of this machine would serve a port that does not exist."""
    last = 65536 - processes
    if first > last:
        raise SettingsError(
            f"--port {first}: {processes} processes need as many ports, and the last would be above 65535; "
            f"use --port {last} or less, or --port 0 to disable the servers"
        )


def count_gpus() -> int:
    """Count the GPUs that CUDA_VISIBLE_DEVICES leaves. Only the driver is used, to take no GPU memory."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


def report_error(text: str, code: int) -> None:
    """Print the error that ends this process, or pass it to `launch`, which prints it once for all processes.

    code: exit code with which this process is about to end.
    """
    if _ERRORS_FD in os.environ:
        os.write(int(os.environ[_ERRORS_FD]), f"{json.dumps([code, text])}\n".encode())
    else:
        print(text, file=sys.stderr)


def is_in_group() -> bool:
    """Return whether this process has joined the group of a run's processes, and not left it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def end_process(code: int) -> NoReturn:
    """End this process, at once if it is still in the group of a run's processes.

    Leaving the group would mean waiting for the others, because NCCL's communicators are destroyed together,
    and the others wait in a collective for this process.
    """
    if is_in_group():
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def launch(command: Sequence[str], processes: int, restarts: int) -> int:
    """Run a command in several processes, each with its rank in the environment. Returns the exit code.

    restarts: how often to restart all of them if that may help. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are
    passed on. A second SIGINT, or a second SIGTERM after more than a second, ends this process, and the
    others with it.
    """
    with StopRequest() as stop:
        for restart in range(1, restarts + 2):
            group = _Group(command, processes)
            group.wait(stop)
            code = group.outcome()
            again = may_restart(code) and not stop.is_made and restart <= restarts
            group.report(code, f"restart {restart} of {restarts}" if again else "")
            if not again:
                break
    return code


class _Group:
    """A group of processes that were started together."""

    def __init__(self, command: Sequence[str], size: int):
        self.errors = open(os.memfd_create("errors"), "r+b")  # noqa: SIM115 – stays open as long as the group
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]  # if it is taken meanwhile, the processes fail and are restarted
        self.processes = [
            subprocess.Popen(
                command,
                env=self._environment(rank, size, port),
                stdin=subprocess.DEVNULL,
                pass_fds=[self.errors.fileno()],
                process_group=0,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 – this process has no threads
            )
            for rank in range(size)
        ]
        self.killed: set[int] = set()  # ranks of the processes that `wait` killed

    def _environment(self, rank: int, size: int, port: int) -> dict[str, str]:
        world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        world |= {"MASTER_PORT": port, _ERRORS_FD: self.errors.fileno()}
        threads = max(1, cpus() // size)
        return {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            **{name: str(value) for name, value in world.items()},
        }

    def wait(self, stop: StopRequest) -> None:
        """Wait until all processes have ended. Pass on a request to stop; if one fails, end the others."""
        passed_on, deadline = None, math.inf
        while None in (codes := [process.poll() for process in self.processes]):
            if stop.signal is not None and stop.signal != passed_on:
                self._send(stop.signal)
                passed_on = stop.signal
            if deadline == math.inf and not {None, 0, *_STOPPED}.issuperset(codes):
                self._send(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                self.killed |= {rank for rank, code in enumerate(codes) if code is None}
                self._send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)

    def _send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # does nothing if the process has ended

    def outcome(self) -> int:
        """Return the exit code that explains how the group ended, with 128 + N for signal N as in a shell.

        Processes that `wait` killed do not count, since they were only waiting for another one.
        """
        codes = [p.returncode for rank, p in enumerate(self.processes) if rank not in self.killed]
        return decisive_exit_code([code if code >= 0 else 128 - code for code in codes])

    def report(self, code: int, restart: str) -> None:
        """Print why the processes ended, each message once, and what happens next.

        code: exit code of the group. restart: which restart follows, if any.
        """
        self.errors.seek(0)
        errors = map(json.loads, self.errors)
        for text in dict.fromkeys(text for number, text in errors if number == code):
            print(text, file=sys.stderr)
        for rank, process in enumerate(self.processes):
            if process.returncode < 0 and 128 - process.returncode == code and code not in _STOPPED:
                name = signal.Signals(-process.returncode).name
                print(f"alexnet-train: the process of rank {rank} was ended by {name}", file=sys.stderr)
        if may_restart(code):
            again = f"restarting all processes from the last checkpoint, {restart}" if restart else ""
            print(f"alexnet-train: {again or 'run the same command again to continue'}", file=sys.stderr)


def decisive_exit_code(codes: Iterable[int]) -> int:
    """Return the exit code that explains the others.

    Codes explain others in this order: a process that was killed or crashed, one that reported an error
    (1 and 2), one that stalled or lost another process, one that was asked to stop, and 0.
    """

    def weight(code: int) -> int:
        if code in _STOPPED:
            return 1
        if code == EXIT_STALLED:
            return 2
        return 4 if code > 128 else 3 * (code > 0)

    return max(codes, key=weight)


def may_restart(code: int) -> bool:
    """Return whether a restart may help, because a process was killed, crashed or stalled."""
    return code == EXIT_STALLED or (code > 128 and code not in _STOPPED)


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
