"""What the live page shows besides the metrics.

The training loop sets it, and the threads that serve pages read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.monitor.batch_view import BatchView
from trainer.monitor.comparison import Earlier
from trainer.monitor.summary import Row


class ErrorsByClass(NamedTuple):
    """Numbers of images and of top-1 errors by class, of the evaluation after `epoch` epochs."""

    epoch: float
    images: Sequence[int]
    errors: Sequence[int]


@dataclass
class LiveData:
    """Attributes are replaced as a whole, so that a page never sees half a change.

    names: the names of the classes, by label. evaluations: rows as in evaluations.csv. earlier: the run to
    compare with.
    """

    names: Sequence[str] = ()
    evaluations: Sequence[Row] = ()
    class_errors: ErrorsByClass | None = None
    earlier: Earlier | None = None
    batch: BatchView = field(default_factory=BatchView)
