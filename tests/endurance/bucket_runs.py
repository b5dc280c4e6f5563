"""The runs of tests/endurance/bucket.py: a local one, and the same from a bucket, with faults or kills."""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.manifest import read_manifest
from tests.endurance.checks import Images, check_end, read_images
from tests.endurance.lives import DifferenceError, Life, Watch, last_step
from tests.endurance.runs import NARROW, Chaos, Reference, Scenario, Strike, Tally, records
from tests.remote.faulty_proxy import FaultyProxy
from trainer.run import Run
from trainer.settings import Settings

ONE = Scenario("one process", 1, (1,), (*NARROW, "--dropout", "2012"))
TWO = Scenario("two processes", 2, (2,), (*NARROW, "--dropout", "2012"))
MOMENTS = "fetching", "evicting"  # in addition to those of lives.py


class CacheWatch(Watch):
    """Also tells from the cache's files whether shards are being fetched or evicted."""

    def __init__(self, run: Run, batch: int, samples: int, cache: Path):
        super().__init__(run, batch, samples)
        self.cache = cache
        self._shards = self._cached()

    def moment(self) -> str:
        moment = super().moment()
        before, self._shards = self._shards, self._cached()
        if {name for name in before - self._shards if name.endswith(".tar")}:
            return "evicting"
        return "fetching" if any(name.endswith(".partial") for name in self._shards) else moment

    def _cached(self) -> set[str]:
        return {path.name for path in self.cache.rglob("*")}


@dataclass
class Place:
    """A dataset in a bucket, and the cache on this machine.

    data: the same dataset in a local folder. proxy: through which the bucket is reached.
    """

    url: str
    data: Path
    cache: Path
    cache_bytes: int
    proxy: FaultyProxy

    @property
    def arguments(self) -> list[str]:
        return ["--data", self.url, "--cache", str(self.cache), "--cache-size", str(self.cache_bytes)]

    def check_cache(self) -> None:
        """Raise DifferenceError if the cache is too large, or a shard in it has other bytes than packed."""
        manifest = read_manifest(self.data)
        shards = {shard.file: shard.sha256 for split in manifest.splits.values() for shard in split.shards}
        total = 0
        for path in self.cache.rglob("*.tar"):
            content = path.read_bytes()
            total += len(content)
            if hashlib.sha256(content).hexdigest() != shards[path.name]:
                raise DifferenceError(f"{path} is complete and has other bytes than were packed")
        if total > self.cache_bytes:
            raise DifferenceError(f"the cache holds {total} bytes, and {self.cache_bytes} are allowed")


@dataclass
class Disturbed:
    """The results of a run whose requests failed."""

    steps: int = 0
    images: int = 0
    wrong_images: int = 0
    lost_steps: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    outages: int = 0
    bytes_fetched: int = 0


class BucketRuns(Chaos):
    """Runs from a bucket, which are compared with runs on the same files in a local folder.

    arguments: settings of all runs, without --data.
    """

    aims: Sequence[str] = ("any time", "start-up", *MOMENTS)

    def __init__(self, settings: Settings, arguments: Sequence[str], folder: Path, seed: int, place: Place):
        self.place, self.given = place, arguments
        super().__init__(settings, [*arguments, *place.arguments], folder, seed)

    def reference(self, scenario: Scenario) -> Reference:
        from_bucket, self.arguments = self.arguments, [*self.given, "--data", str(self.place.data)]
        try:
            return super().reference(scenario)
        finally:
            self.arguments = from_bucket

    def watch(self, run: Run) -> Watch:
        return CacheWatch(run, self.batch, self.samples, self.place.cache)

    def strike(self, strike: Strike, life: Life, watch: Watch, start_seconds: float, tally: Tally) -> bool:
        killed = super().strike(strike, life, watch, start_seconds, tally)
        self.place.check_cache()
        return killed

    def disturb(self, scenario: Scenario, outages: int) -> Disturbed:
        """Train through the proxy's faults, and through outages, and compare the run with the local one.

        outages: their number; they last for seconds and come at equal distances. Raises DifferenceError if
        the runs differ.
        """
        reference = self.reference(scenario)
        run, proxy, done = self.run("disturbed"), self.place.proxy, Disturbed()
        shutil.rmtree(self.place.cache, ignore_errors=True)
        before, injected = proxy.bytes_sent, Counter(proxy.faults.injected)
        begun, steps = time.monotonic(), len(reference.images)
        life = self.start(scenario, run, 0, scenario.begun)
        while not life.is_over():
            if done.outages < outages and last_step(run.metrics.path) * (outages + 1) > steps * (
                done.outages + 1
            ):
                done.outages += 1
                proxy.link.outage_for(float(self.rng.uniform(1, 10)), silent=done.outages % 2 == 0)
            time.sleep(0.05)
        self.check_codes(run, life.join())
        done.seconds = time.monotonic() - begun
        done.bytes_fetched = proxy.bytes_sent - before
        done.faults = Counter(proxy.faults.injected) - injected
        images, _ = read_images(records(run), self.batch)
        done.steps, done.images = steps, sum(map(len, reference.images.values()))
        done.wrong_images = count_wrong(images, reference.images)
        done.lost_steps = len(reference.images.keys() - images.keys())
        check_end(run, reference.run, same_world=True)
        self.place.check_cache()
        if proxy.faults.pending:
            raise DifferenceError(f"{proxy.faults.pending} faults were left at the end: choose more epochs")
        return done


def count_wrong(images: Images, reference: Images) -> int:
    """Return the number of images that differ from the reference's, or that are missing."""
    return sum(
        images.get(step, {}).get(index) != image
        for step, expected in reference.items()
        for index, image in expected.items()
    )
