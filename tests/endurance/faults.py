"""Pack or train again and again while each file-system call fails in turn.

    python tests/endurance/faults.py packing --seconds 120 --seed 0
    python tests/endurance/faults.py training
    python tests/endurance/faults.py continuing

The job first runs undisturbed, and its calls are recorded. `continuing` is the resumed part of a training run
that was stopped. Then each call fails with each error that it can return (listed in faulty_storage.py), once
or from then on, and reads and writes are cut short. After each fault the same command runs again. The exit
code is 1 if any of the following is violated. For packing:

    exit code 0     the dataset has the bytes of the undisturbed one, except for files that were rejected by
                    name because the error concerned them
    dataset.json    if it exists, the folder verifies, picture by picture
    exit code 1     one line names the file and the reason
    again           the same command ends with the bytes of the undisturbed dataset

For training:

    exit code 0     losses, weights, best checkpoint and report are the undisturbed ones, unless samples were
                    skipped
    exit code 1     one line names the file and the reason
    at any time     the newest and the best checkpoint so far, or later ones, can be loaded
    again           the same command ends with the undisturbed losses and weights, bit for bit

With --seconds, random cases are tried until the time is over; otherwise all of them.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.endurance.faulty_storage import ERRORS, Call, Fault
from tests.endurance.jobs import Packing
from tools.draw_pictures import class_names, draw
from tools.options import command_parser, natural, positive

if TYPE_CHECKING:  # which imports torch
    from tests.endurance.faulty_training import Training

MANY = 12  # of a call that occurs more often, only some occurrences fail


def draw_input(folder: Path, classes: int, train: int, val: int) -> None:
    """Draw training and validation pictures of the first classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in class_names()[:classes]:
            pictures = folder / "in" / split / name
            pictures.mkdir(parents=True)
            for number in range(count):
                draw(name, rng).save(pictures / f"{number}.jpg")


def packing(folder: Path) -> Packing:
    draw_input(folder, classes=2, train=2, val=1)
    return Packing(folder)


def training(folder: Path, continued: bool = False) -> "Training":
    from pipeline.packing.options import PackingOptions
    from pipeline.packing.pack import pack
    from tests.endurance.faulty_training import Training

    draw_input(folder, classes=10, train=6, val=2)
    pack(PackingOptions(str(folder / "in"), str(folder / "data"), size=80, shard_samples=25, workers=1))
    return Training(folder, continued)


JOBS: dict[str, "Callable[[Path], Packing | Training]"] = {
    "packing": packing,
    "training": training,
    "continuing": partial(training, continued=True),
}


def all_faults(calls: dict[Call, int]) -> list[Fault]:
    """Return the faults of all recorded calls: every error, once and lasting.

    Each occurrence of a call fails or, if there are more than MANY, the first, the middle and the last.
    """
    return [
        Fault(call, time, error, lasting)
        for call, count in sorted(calls.items())
        for time in (range(1, count + 1) if count <= MANY else (1, count // 2, count))
        for error in ERRORS[call.name]
        for lasting in (False, True)
    ]


def table(tried: Iterable[Fault], wrong: Counter[str]) -> list[str]:
    """Return a table with a line for each kind of call: runs, violations and errors."""
    runs = Counter(fault.call.name for fault in tried)
    lines = [f"{'call':20}{'runs':>8}{'violations':>12}  errors"]
    lines += [
        f"{name:20}{count:8,}{wrong[name]:12,}  {' '.join(ERRORS[name])}"
        for name, count in sorted(runs.items())
    ]
    return [*lines, f"{'all':20}{runs.total():8,}{wrong.total():12,}"]


def try_all(job: "Packing | Training", faults: Iterable[Fault], seconds: float) -> Counter[str]:
    """Try faults until the time is over and print violations; return their number for each kind of call."""
    wrong: Counter[str] = Counter()
    tried, end = [], time.monotonic() + seconds
    for fault in faults:
        if time.monotonic() > end:
            break
        tried.append(fault)
        for violation in job.try_fault(fault)[1]:
            wrong[fault.call.name] += 1
            print(f"{fault}: {violation}", flush=True)
    print(*table(tried, wrong), sep="\n")
    return wrong


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "job", choices=JOBS, nargs="?", default="packing", help="job to disturb (default packing)"
    )
    parser.add_argument(
        "--seconds", type=positive, metavar="S", help="try random cases for this long (default: all cases)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="seed of the cases' order (default 0)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = JOBS[options.job](Path(folder, "job"))
        faults = all_faults(job.calls)
        random.Random(options.seed).shuffle(faults)
        wrong = try_all(job, faults, options.seconds or float("inf"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
