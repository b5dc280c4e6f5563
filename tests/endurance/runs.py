"""The runs of tests/endurance/chaos.py: once without kills, then killed until they are complete."""

import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.manifest import read_manifest
from tests.endurance.checks import Images, begun_steps, check_end, check_images, check_saved, read_images
from tests.endurance.lives import CommandLife, DifferenceError, ForkedLife, Life, Watch, last_step, warm_up
from trainer.run import Run
from trainer.settings import Settings

AIMS = ("any time", "start-up", "checkpoint write", "evaluation")
CLOSE = 1e-3  # relative difference of losses where the number of processes is not the same
POLL_SECONDS = 0.002
BLINK_SECONDS = 0.1  # at most, from what a kill is aimed at to the kill
DEADLINE_SECONDS = 180.0  # for the other processes to end after one was killed


class Scenario(NamedTuple):
    """A way to kill runs.

    begun, continued: numbers of processes at the start and, in turn, after kills. forked: whether lives come
    from the fork server; otherwise they are the unmodified command.
    """

    name: str
    begun: int
    continued: tuple[int, ...]
    settings: tuple[str, ...] = ()
    forked: bool = True

    @property
    def same_world(self) -> bool:
        return set(self.continued) == {self.begun}


NARROW = ("--width", "0.0625")  # makes steps take milliseconds
# Each rank draws its own dropout masks, so dropout is off where the number of ranks changes.
SCENARIOS = (
    Scenario("1", 1, (1,), (*NARROW, "--dropout", "2012")),
    Scenario("2", 2, (2,), (*NARROW, "--dropout", "2012")),
    Scenario("1 to 1, 2, 4", 1, (1, 2, 4), (*NARROW, "--dropout", "off")),
    Scenario("2 to 1, 2, 4", 2, (1, 2, 4), (*NARROW, "--dropout", "off")),
)
COMMAND = Scenario("alexnet-train", 1, (1,), ("--epochs", "3"), forked=False)
TORCHRUN = Scenario("torchrun", 2, (2,), ("--epochs", "3"), forked=False)
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "9")


@dataclass
class Tally:
    """Counts of what was done in a scenario, and its results."""

    kills: Counter[str] = field(default_factory=Counter)  # by moment
    runs: int = 0
    lives: int = 0
    steps_on: Counter[int] = field(default_factory=Counter)  # by number of processes
    one_rank_kills: int = 0  # kills of one rank of several
    longest_end_seconds: float = 0.0  # until the other ranks had ended after such a kill
    steps_done_twice: int = 0  # from the record of images, which only forked lives have
    most_after_a_kill: int = 0  # likewise
    loss_difference: float = 0.0  # the largest relative difference


class Reference(NamedTuple):
    """A run without kills, to compare with."""

    run: Run
    images: Images
    start_seconds: float  # until its first line of metrics, per process


class Strike(NamedTuple):
    """A kill, drawn at random before the life begins. rank: the rank to kill, or None for all.

    delay: 0 to 1. nth: which occurrence of the aimed-at moment to wait for.
    """

    aim: str
    delay: float
    nth: int
    rank: int | None


class Chaos:
    """Runs of one command, each in its own folder under `folder`."""

    aims: Sequence[str] = AIMS

    def __init__(self, settings: Settings, arguments: Sequence[str], folder: Path, seed: int):
        self.arguments, self.folder, self.batch = arguments, folder, settings.batch
        self.samples = read_manifest(settings.data).split("train").samples
        every = settings.checkpoint_steps or -(-self.samples // self.batch)
        self.unsaved_steps = 2 * every  # a save starts when the previous one has ended
        self.rng = np.random.default_rng(seed)
        self.references: dict[tuple, Reference] = {}
        warm_up()

    def kill(self, scenario: Scenario, kills: int) -> Tally:
        """Kill a scenario's runs `kills` times, over as many runs as that takes. Raises DifferenceError."""
        tally, reference = Tally(), self.reference(scenario)
        while (left := kills - tally.kills.total()) > 0:
            self.kill_until_through(scenario, reference, tally, left)
        return tally

    def reference(self, scenario: Scenario) -> Reference:
        """Return the run to compare with, on one process if the number of processes changes."""
        world = scenario.begun if scenario.same_world else 1
        key = (world, scenario.settings, scenario.forked)
        if key not in self.references:
            run = self.run(f"whole-{len(self.references)}")
            begun = time.monotonic()
            life = self.start(scenario, run, 0, world)
            while not last_step(run.metrics.path) and not life.is_over():
                time.sleep(POLL_SECONDS)
            start_seconds = (time.monotonic() - begun) / world  # the processes share the machine
            self.check_codes(run, life.join())
            self.references[key] = Reference(run, read_images(records(run), self.batch)[0], start_seconds)
        return self.references[key]

    def run(self, name: str) -> Run:
        run = Run(self.folder / name)
        records(run).mkdir(parents=True)
        return run

    def start(self, scenario: Scenario, run: Run, number: int, world: int) -> Life:
        arguments = [*self.arguments, *scenario.settings, "--out", str(run.folder)]
        if scenario.forked:
            return ForkedLife(arguments, world, records(run) / life_name(number, world), log(run))
        launcher = _TORCHRUN if scenario is TORCHRUN else ()
        return CommandLife([*launcher, "-m", "trainer.cli", *arguments], log(run))

    def watch(self, run: Run) -> Watch:
        return Watch(run, self.batch, self.samples)

    def check_codes(self, run: Run, codes: list[int]) -> None:
        if any(codes):
            raise DifferenceError(f"{run.folder} ended by itself with exit codes {codes}: see {log(run)}")

    def kill_until_through(self, scenario: Scenario, reference: Reference, tally: Tally, kills: int) -> None:
        """Kill one run at most `kills` times, and compare it when it is complete."""
        run = self.run(f"{scenario.name.replace(',', '').replace(' ', '-')}-{tally.runs}")
        tally.runs += 1
        worlds, saved = cycle(scenario.continued), 0
        for number in range(kills + 1):
            world = next(worlds) if saved else scenario.begun
            watch = self.watch(run)
            strike = self.draw(world)
            life = self.start(scenario, run, number, world)
            tally.lives += 1
            start_seconds = reference.start_seconds * world
            killed = number < kills and self.strike(strike, life, watch, start_seconds, tally)
            if not killed:
                self.check_codes(run, life.join())
            first, last = begun_steps(records(run), life_name(number, world))
            tally.steps_on[world] += last - first
            if last and first != saved:
                raise DifferenceError(f"{run.folder} resumed after step {first}, but step {saved} was saved")
            if not killed:
                break
            saved = check_saved(run, watch.durable)
            tally.most_after_a_kill = max(tally.most_after_a_kill, last - saved)
            if last - saved > self.unsaved_steps:
                raise DifferenceError(
                    f"{run.folder}: {last - saved} steps were lost at once, to step {saved}"
                )
        self.compare(scenario, run, reference, tally)

    def compare(self, scenario: Scenario, run: Run, reference: Reference, tally: Tally) -> None:
        """Compare a complete run with its reference, and delete its folder if they agree."""
        images, begun = read_images(records(run), self.batch)
        check_images(images, reference.images)
        tally.steps_done_twice += begun - len(reference.images)
        difference = check_end(run, reference.run, scenario.same_world)
        tally.loss_difference = max(tally.loss_difference, difference)
        if difference > CLOSE:
            raise DifferenceError(
                f"a loss of {run.folder} differs from that without kills by {difference:.2%}"
            )
        shutil.rmtree(run.folder)
        shutil.rmtree(records(run))

    def draw(self, world: int) -> Strike:
        rank = int(self.rng.integers(world))
        return Strike(
            aim=str(self.rng.choice(self.aims)),
            delay=self.rng.uniform(),
            nth=int(self.rng.integers(1, 5)),
            rank=rank if world > 1 and self.rng.uniform() < 0.5 else None,
        )

    def strike(self, strike: Strike, life: Life, watch: Watch, start_seconds: float, tally: Tally) -> bool:
        """Kill a life and wait until all of it has ended; return False if it was over before."""
        reaches = {"any time": 3 * start_seconds, "start-up": start_seconds}
        if strike.aim not in reaches:
            follow(life, watch, strike.aim, strike.nth)
        pause(life, watch, strike.delay * reaches.get(strike.aim, BLINK_SECONDS))
        if life.is_over():
            return False
        ranks = range(life.world) if strike.rank is None else [strike.rank]
        life.kill(ranks)
        killed, moment = time.monotonic(), watch.moment()
        codes = life.join(DEADLINE_SECONDS)
        if not any(codes):
            return False
        if unasked := [codes[rank] for rank in ranks if codes[rank] not in (0, -signal.SIGKILL)]:
            self.check_codes(watch.run, unasked)
        if strike.rank is not None:
            tally.one_rank_kills += 1
            tally.longest_end_seconds = max(tally.longest_end_seconds, time.monotonic() - killed)
        tally.kills[moment] += 1
        return True


def records(run: Run) -> Path:
    """Return the folder in which the lives of a run record their images."""
    return run.folder.with_suffix(".images")


def log(run: Run) -> Path:
    return run.folder.with_suffix(".log")


def life_name(number: int, world: int) -> str:
    return f"{number:04}-{world}"


def follow(life: Life, watch: Watch, moment: str, nth: int) -> None:
    """Wait until a moment occurs for the nth time, or the life is over."""
    before = False
    while nth and not life.is_over():
        now = watch.moment() == moment
        nth -= now and not before
        before = now
        time.sleep(POLL_SECONDS)


def pause(life: Life, watch: Watch, seconds: float) -> None:
    """Wait, while watching for checkpoints."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.is_over():
        watch.moment()
        time.sleep(POLL_SECONDS)
