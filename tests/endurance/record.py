"""The record of an endurance run: what was run where, how long it took, and what it found."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.environment import environment


def write_record(begun: float, results: Mapping[str, Any], path: Path | None) -> None:
    """Print the record of a run as a line of JSON, and append it to a file if a path is given.

    begun: when the run began, by the monotonic clock. results: further fields of the record.
    """
    record = {
        "command": " ".join(sys.argv),
        "seconds": round(time.monotonic() - begun),
        "environment": environment("CPU"),
    }
    line = json.dumps(record | dict(results))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            print(line, file=file)
    print(line)
