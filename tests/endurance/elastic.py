"""Kill one rank of two under torchrun, which starts both again."""

import os
import signal
import time
from pathlib import Path

from tests.endurance.checks import DifferenceError
from tests.endurance.lives import CommandLife, Watch, last_step
from tests.endurance.runs import DEADLINE_SECONDS, POLL_SECONDS, TORCHRUN, Chaos, Tally
from trainer.run import Run


def ranks_of(torchrun: int) -> dict[int, int]:
    """Return the process of each rank that a torchrun has started."""
    ranks = {}
    for children in Path(f"/proc/{torchrun}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    ranks[int(entry[5:])] = pid
    return ranks


def kill_under_torchrun(chaos: Chaos, kills: int) -> Tally:
    """Kill a rank at steps spread over the run. Raises DifferenceError."""
    tally, reference = Tally(runs=1, lives=1), chaos.reference(TORCHRUN)
    run, steps = chaos.run(TORCHRUN.name), last_step(reference.run.metrics.path)
    watch = Watch(run, chaos.batch, chaos.samples)
    life = chaos.start(TORCHRUN, run, 0, 2)
    assert isinstance(life, CommandLife)
    try:
        for number in range(kills):
            step = chaos.rng.integers(steps * number // kills, steps * (number + 1) // kills)
            while not life.is_over() and last_step(run.metrics.path) <= step:
                time.sleep(POLL_SECONDS)
            if life.is_over():
                break
            os.kill(ranks_of(life.process.pid)[int(chaos.rng.integers(2))], signal.SIGKILL)
            tally.kills[watch.moment()] += 1
            tally.one_rank_kills += 1
            tally.lives += 1
            watch = Watch(run, chaos.batch, chaos.samples)
            wait_for_start(run, life)
        chaos.ended_well(run, life.join())
    finally:
        if not life.is_over():
            life.process.terminate()  # torchrun passes the signal on
            life.join()
    chaos.compare(TORCHRUN, run, reference, tally)
    return tally


def wait_for_start(run: Run, life: CommandLife) -> None:
    """Wait until the processes have been restarted and have read their checkpoint."""
    before, end = len(run.starts()), time.monotonic() + DEADLINE_SECONDS
    while not life.is_over() and len(run.starts()) == before:
        if time.monotonic() > end:
            raise DifferenceError(f"torchrun has not restarted the processes within {DEADLINE_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
