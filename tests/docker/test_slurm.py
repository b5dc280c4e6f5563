"""The sbatch script, and a job of it that Slurm interrupts in each of the ways that it has."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import DEADLINE_SECONDS, REPO, command, exact, rows, run, wait_until
from tests.slurm import cluster

SCRIPT = REPO / "docker/slurm/train.sbatch"
SETTINGS = ["--epochs", "40", "--evaluate-epochs", "40"]  # 200 steps

# alexnet-train with steps of at least 50 ms, so that a run cannot end before it is interrupted.
SLOW = f"""#!{sys.executable}
import sys, time
sys.path.insert(0, {str(REPO)!r})
from pipeline import training
from trainer import cli

load = training.train_loader

def slow(*arguments, **options):
    for batch in load(*arguments, **options):
        time.sleep(0.05)
        yield batch

training.train_loader = slow
cli.main()
"""


# srun ends with $CODE, or with 138 after SIGUSR1 if that is empty; scontrol records a job that it requeues.
SRUN = """#!/bin/bash
trap 'exit 138' USR1
touch started
[ -n "$CODE" ] && exit "$CODE"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
case $1 in
    requeue) echo "$2" > requeued ;;
    show) echo "JobId=$3 PreemptTime=$PREEMPTED" ;;
esac
"""


def make_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "preempted", "is_requeued"),
    [
        (None, "None", True),
        ("143", "2026-11-29T12:00:00", True),
        ("143", "None", False),
        ("138", "None", True),
        ("1", "2026-11-29T12:00:00", False),
        ("0", "None", False),
    ],
)
def test_a_job_is_requeued_if_it_was_stopped_for_another_or_for_its_time(
    tmp_path, code, preempted, is_requeued
):
    make_program(tmp_path / "bin/srun", SRUN)
    make_program(tmp_path / "bin/scontrol", SCONTROL)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NTASKS": "2"}
    variables |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    variables |= {"CODE": code or "", "PREEMPTED": preempted, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env=os.environ | variables)
    if code is None:
        wait_until((tmp_path / "started").exists, script)
        script.send_signal(signal.SIGUSR1)
    assert script.wait(DEADLINE_SECONDS) == int(code or 138)
    assert (tmp_path / "requeued").exists() == is_requeued


@pytest.mark.slow
def test_a_job_that_is_interrupted_thrice_has_the_losses_of_an_uninterrupted_run(
    packed, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, log, programs = tmp_path / "run", tmp_path / "job.log", tmp_path / "bin"
    make_program(programs / "alexnet-train", SLOW)
    with cluster(tmp_path) as slurm:
        slurm.environment["PATH"] = f"{programs}:{slurm.environment['PATH']}"
        slurm.environment["MASTER_ADDR"] = "127.0.0.1"  # as the nodes' names are not those of hosts
        size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
        arguments = command(packed, out, *SETTINGS)[2:]
        job = slurm.submit(*size, f"--output={log}", SCRIPT, *arguments)
        announce = ["scancel", "--batch", "--signal=USR1", job]  # as at the time limit
        preempt = ["sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1"]  # SIGTERM and 60 s
        requeue = ["scontrol", "requeue", job]  # two SIGTERMs, as at a preemption without GraceTime
        done = 0
        for restarts, interrupt in enumerate((announce, preempt, requeue), start=1):
            wait_until(lambda done=done: len(rows(out / "metrics.csv")) >= done + 10)
            slurm.run(*interrupt)
            slurm.wait_for(job, Restarts=str(restarts), JobState="PENDING")
            done = len(rows(out / "metrics.csv"))
            wait_until(lambda done=done: f"continuing {out} after step {done}, " in log.read_text())
        slurm.wait_for(job, JobState="COMPLETED", ExitCode="0:0")
    text = log.read_text()
    assert re.findall("SIG[A-Z0-9]+(?=: saved)", text)[:2] == ["SIGUSR1", "SIGTERM"]
    assert text.count("continuing") == 3
    run(*command(packed, tmp_path / "whole", *SETTINGS, "--processes", "2"))
    assert exact(out / "metrics.csv") == exact(tmp_path / "whole/metrics.csv")
    assert rows(out / "evaluations.csv") == rows(tmp_path / "whole/evaluations.csv")
