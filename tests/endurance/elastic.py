"""Kill one rank of two under torchrun, which starts both again."""

import os
import signal
import time

from tests.endurance.checks import DifferenceError
from tests.endurance.lives import CommandLife, Watch, last_step
from tests.endurance.runs import DEADLINE_SECONDS, POLL_SECONDS, TORCHRUN, Chaos, Tally
from tests.helpers import ranks_of
from trainer.run import Run


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
            os.kill(ranks_of(life.process.pid)[str(chaos.rng.integers(2))], signal.SIGKILL)
            tally.kills[watch.moment()] += 1
            tally.one_rank_kills += 1
            tally.lives += 1
            watch = Watch(run, chaos.batch, chaos.samples)
            wait_for_start(run, life)
        chaos.check_codes(run, life.join())
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
