"""Reading what an experiment has kept in --out, to continue from it or to use it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files import path_in_errors
from pipeline.messages import one_line
from tools.experiments.record import RecordError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a kept file in this context. Raises RecordError if it is damaged, and an OSError that names it."""
    try:
        with path_in_errors(path):
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch and NumPy raise any class for a file that they did not write
        raise RecordError(
            f"{path} is damaged ({one_line(error)}): delete it and run the same command again"
        ) from None
