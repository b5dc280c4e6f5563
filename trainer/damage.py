"""Count the damaged samples that a run leaves out, and end the run if there are too many."""

from collections.abc import Callable

from pipeline.checked import Damage
from pipeline.manifest import DatasetError
from trainer.monitor.metrics import Metrics
from trainer.processes.distributed import World
from trainer.processes.stop import StopRequest


class DamagedSamples:
    """The damaged samples that this process has left out.

    limit: the number of them that the settings allow. warn: shows a warning to the user.
    """

    def __init__(
        self, limit: int, world: World, metrics: Metrics, stop: StopRequest, warn: Callable[[str], None]
    ):
        self.limit, self.world, self.metrics = limit, world, metrics
        self.stop, self.warn = stop, warn
        self._locations: set[str] = set()

    def add(self, damage: Damage) -> None:
        """Count a damaged sample, and end the run with a DatasetError if there are too many.

        A single process raises the error at once. One of several continues with the intact samples until all
        processes stop together and the main process has saved.
        """
        if damage.location not in self._locations:  # each evaluation finds its own again
            self.metrics.input_errors[damage.reason].inc()
            self.warn(f"left out: {damage}")
            self._locations.add(damage.location)
        if len(self._locations) > self.limit:
            error = DatasetError(
                f"more than {self.limit} samples are damaged, the last of them {damage}: "
                "copy the shard again, or allow more with --max-bad-samples"
            )
            if self.world.size == 1:
                raise error
            self.stop.error = error
