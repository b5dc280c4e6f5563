"""Two hosts: network namespaces, each with an address, connected by a virtual cable; torchrun uses gloo.

Both hosts see the same run folder, as on a network file system.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.helpers import DEADLINE_SECONDS, command, exact, rows, wait_until
from tests.remote.faulty_proxy import FaultyProxy
from trainer import checkpoint
from trainer.processes.watchdog import EXIT_STALLED

pytestmark = pytest.mark.slow

STEPS = 200  # enough that a run cannot end between a check of its table and the next action
SETTINGS = ["--epochs", "40", "--checkpoint-steps", "2"]


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Host:
    """A network namespace. The first, 10.77.6.1, has rank 0 and is where torchrun's processes meet."""

    def __init__(self, number: int, folder: Path):
        self.number, self.name, self.address = number, f"host-{os.getpid()}-{number}", f"10.77.6.{number}"
        self.is_first, self.log = number == 1, folder / f"host-{number}.log"
        self.process: subprocess.Popen | None = None
        self.environment: dict[str, str] = {}

    def start(self, arguments: list[str], restarts: int = 0) -> None:
        """Start this host's part of a run and write its output to a log of its own."""
        world = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts)]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.6.1:29400", "--local-addr", self.address]
        meet += ["--rdzv-conf", f"is_host={self.is_first:d}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *world, *meet, *arguments]
        network = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *torchrun],
                stdout=log,
                stderr=log,
                env=os.environ | network | self.environment,
            )

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Send SIGKILL to all processes on this host."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()

    def ranks(self) -> set[str]:
        """Return the ranks of the trainers on this host."""
        found = set()
        for pid in self.pids():
            with suppress(OSError):  # the process has just ended
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {text.decode() for text in variables if text.startswith(b"RANK=")}
        return found

    def link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", "eth0", state)

    def connect_to_this_machine(self, stack: ExitStack) -> str:
        """Lay a cable to this machine, and return the address of its end here."""
        end, here, there = f"{self.name[5:]}-host", f"10.77.7{self.number}.1", f"10.77.7{self.number}.2"
        ip("link", "add", end, "type", "veth", "peer", "name", "eth1", "netns", self.name)
        stack.callback(ip, "link", "delete", end)
        ip("address", "add", f"{here}/24", "dev", end)
        ip("link", "set", end, "up")
        ip("-n", self.name, "address", "add", f"{there}/24", "dev", "eth1")
        ip("-n", self.name, "link", "set", "eth1", "up")
        return here


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2: apt-get install iproute2")
    first, second = pair = [Host(number, tmp_path) for number in (1, 2)]
    with ExitStack() as stack:
        for host in pair:
            made = subprocess.run(
                ["ip", "netns", "add", host.name], capture_output=True, text=True, check=False
            )
            if made.returncode:
                pytest.skip(f"needs root, for network namespaces: {made.stderr.strip()}")
            stack.callback(ip, "netns", "delete", host.name)
        cable = ["eth0", "netns", first.name, "type", "veth", "peer", "name", "eth0", "netns", second.name]
        ip("link", "add", *cable)
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
            stack.callback(host.kill)
        yield pair


@pytest.fixture(scope="module")
def one_host(packed, tmp_path_factory) -> Path:
    """The run folder of the same two processes on one host."""
    out = tmp_path_factory.mktemp("one-host") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *command(packed, out, *SETTINGS)], check=True)
    return out


def start(hosts: list[Host], arguments: list[str], restarts: int = 0) -> None:
    for host in hosts:
        host.start(arguments, restarts)


def ended(hosts: list[Host]) -> list[int]:
    return [host.process.wait(DEADLINE_SECONDS) for host in hosts]


def test_a_brief_network_failure_and_a_lost_host_do_not_change_the_losses(hosts, packed, one_host, tmp_path):
    first, second = hosts
    metrics = tmp_path / "run/metrics.csv"
    arguments = command(packed, tmp_path / "run", *SETTINGS)
    start(hosts, arguments, restarts=1)
    wait_until(lambda: len(rows(metrics)) >= 2)
    assert [host.ranks() for host in hosts] == [{"RANK=0"}, {"RANK=1"}]
    second.link("down")
    time.sleep(2)  # shorter than any time limit, so the failure must go unnoticed
    stood = len(rows(metrics))
    second.link("up")
    folder = metrics.parent / "checkpoints"
    wait_until(lambda: len(rows(metrics)) > stood + 1 and checkpoint.list_checkpoints(folder))
    assert "continuing" not in first.log.read_text()  # nothing had to be restarted
    second.kill()
    assert len(rows(metrics)) < STEPS
    second.start(arguments, restarts=1)
    assert ended(hosts) == [0, 0], first.log.read_text() + second.log.read_text()
    assert "continuing" in first.log.read_text()
    assert exact(metrics) == exact(one_host / "metrics.csv")
    assert rows(tmp_path / "run/evaluations.csv") == rows(one_host / "evaluations.csv")


def test_a_long_network_failure_ends_both_hosts_with_stacks_and_the_same_commands_continue(
    hosts, packed, one_host, tmp_path
):
    first, second = hosts
    metrics = tmp_path / "run/metrics.csv"
    arguments = command(packed, tmp_path / "run", *SETTINGS, "--stall-seconds", "10")
    start(hosts, arguments)
    wait_until(lambda: len(rows(metrics)) >= 3)
    second.link("down")
    assert first.process.wait(DEADLINE_SECONDS) == 1  # torchrun's exit code does not depend on its processes'
    wait_until(lambda: not second.ranks())  # its torchrun waits for the first host's to respond
    second.link("up")
    assert second.process.wait(DEADLINE_SECONDS) == 1
    for rank, host in enumerate(hosts):
        assert f"rank {rank} has made no progress" in host.log.read_text()
        assert "in run_to_end" in host.log.read_text()  # in a step, or in a collective between two steps
    assert f"exitcode: {EXIT_STALLED}" in first.log.read_text()
    start(hosts, arguments)
    assert ended(hosts) == [0, 0], first.log.read_text() + second.log.read_text()
    assert "continuing" in first.log.read_text()
    assert exact(metrics) == exact(one_host / "metrics.csv")


def test_each_host_fetches_every_shard_once_from_a_bucket_and_learns_as_from_its_disk(
    hosts, packed, packed_url, seaweedfs_url, one_host, tmp_path
):
    with ExitStack() as stack:
        proxies = []
        for host in hosts:
            address = host.connect_to_this_machine(stack)
            proxies.append(stack.enter_context(FaultyProxy(seaweedfs_url, address=address)))
            host.environment = {"AWS_ENDPOINT_URL": proxies[-1].url, "NO_PROXY": address}
            cache = str(tmp_path / f"cache-{host.number}")
            host.start(command(packed_url, tmp_path / "run", *SETTINGS, "--cache", cache))
        assert ended(hosts) == [0, 0], hosts[0].log.read_text() + hosts[1].log.read_text()
    assert exact(tmp_path / "run/metrics.csv") == exact(one_host / "metrics.csv")
    shards = {path.name: path.stat().st_size for path in packed.glob("train-*.tar")}
    for proxy in proxies:
        sent = {Path(path).name: traffic.bytes for path, traffic in proxy.traffic.items()}
        # In 40 epochs each shard came once, and beside it samples of the first steps with what lies between.
        assert all(size <= sent[name] < 10 * size for name, size in shards.items())
