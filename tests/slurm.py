"""A Slurm cluster of two nodes on this machine, for as long as a context."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers import free_ports, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Jobs of `low` may save for a minute when those of `high` preempt them. cred_expire shortens the time that a
# requeued job waits. Memory and CPUs are counted, not limited.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=60
"""


class Cluster:
    """The commands of a user of the cluster. environment: that of the commands and the jobs."""

    def __init__(self, configuration: Path):
        self.environment = os.environ | {"SLURM_CONF": str(configuration)}

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: object) -> str:
        """Submit a job by sbatch and return its number."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        pairs = (word.partition("=") for word in self.run("scontrol", "show", "job", number).split())
        return {name: value for name, _, value in pairs}

    def wait_for(self, number: str, **values: str) -> None:
        """Wait until Slurm shows these values of a job."""
        wait_until(lambda: values.items() <= self.job(number).items(), pause=0.2)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and two slurmd, or skip the test where Slurm is not installed."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"needs Slurm, but lacks {missing[0]}: apt-get install slurm-wlm munge")
    if os.getuid():
        pytest.skip("needs root, to start Slurm's daemons")
    host = socket.gethostname().partition(".")[0]
    (port, *ports), user = free_ports(3), getpass.getuser()
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, host=host, user=user, port=port, ports=ports)
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed"}
    munge = [f"--{option}={folder / name}" for option, name in (files | {"log-file": "munged.log"}).items()]
    with ExitStack() as stack:
        found = Cluster(configuration)

        def start(name: str, *command: str) -> None:
            log = stack.enter_context(open(folder / f"{name}.log", "w"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=found.environment)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start("munge", "munged", "--foreground", "--force", *munge)
        wait_until((folder / "munge.socket").exists)
        start("slurmctld", "slurmctld", "-D", "-f", str(configuration))
        for node in ("n0", "n1"):
            start(node, "slurmd", "-D", "-f", str(configuration), "-N", node)
        wait_until(lambda: "2 idle" in found.run("sinfo", "--partition=low", "--noheader", "--format=%D %t"))
        try:
            yield found
        finally:
            found.run("scancel", "--user", user)
            wait_until(lambda: not found.run("squeue", "--noheader"), pause=0.2)
