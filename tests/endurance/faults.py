"""Pack or train again and again while one file-system call after the other fails.

    python tests/endurance/faults.py packing --seconds 120 --seed 0
    python tests/endurance/faults.py training
    python tests/endurance/faults.py continuing

The job is done first with nothing to disturb it, and recorded. `continuing` is the second life of a training
that was stopped. Then each of its calls is made to fail with each error that it may answer (faulty_storage.py
lists them), once and from then on, and reads and writes fall short. After each fault the same command is
given again. It ends with 1 if any of this does not hold. Of a packing:

    exit code 0     the dataset is there, with the bytes of the undisturbed packing, but for files that were
                    rejected by name because the error was their own
    dataset.json    the folder verifies, picture by picture
    exit code 1     one line names the file and the reason
    again           the same command ends with the bytes of the undisturbed packing

Of a training:

    exit code 0     the losses, weights, best and report of the undisturbed one, unless samples were left out
    exit code 1     one line names the file and the reason
    at any time     the newest checkpoint and the best that were there can be loaded, or later ones can
    again           the same command ends with the undisturbed losses and weights, bit for bit

With --seconds, the cases are drawn by the seed until the time is over; without, all are tried.
"""

import argparse
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
from tools.options import natural, positive

if TYPE_CHECKING:  # which imports torch
    from tests.endurance.faulty_training import Training

MANY = 12  # times that a call comes, of which some stand for the others


def draw_input(folder: Path, classes: int, train: int, val: int) -> None:
    """So many pictures of each class, to train and to validate on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in class_names()[:classes]:
            place = folder / "in" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                draw(name, rng).save(place / f"{number}.jpg")


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
    """Each call that was recorded, each time that it came, or the first, the middle and the last of many
    times, with each error, once and for good."""
    return [
        Fault(call, time, error, lasting)
        for call, count in sorted(calls.items())
        for time in (range(1, count + 1) if count <= MANY else (1, count // 2, count))
        for error in ERRORS[call.name]
        for lasting in (False, True)
    ]


def table(tried: Iterable[Fault], wrong: Counter[str]) -> list[str]:
    """A line for each kind of call: errors, runs, violations."""
    runs = Counter(fault.call.name for fault in tried)
    lines = [f"{'call':20}{'runs':>8}{'violations':>12}  errors"]
    lines += [
        f"{name:20}{count:8,}{wrong[name]:12,}  {' '.join(ERRORS[name])}"
        for name, count in sorted(runs.items())
    ]
    return [*lines, f"{'all':20}{runs.total():8,}{wrong.total():12,}"]


def try_all(job: "Packing | Training", faults: Iterable[Fault], seconds: float) -> Counter[str]:
    """Try them until the time is over, printing what does not hold; violations by the name of the call."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("job", choices=JOBS, nargs="?", default="packing", help="default packing")
    parser.add_argument(
        "--seconds", type=positive, metavar="S", help="of cases drawn by the seed (default: all)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of their order (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = JOBS[options.job](Path(folder, "job"))
        faults = all_faults(job.calls)
        random.Random(options.seed).shuffle(faults)
        wrong = try_all(job, faults, options.seconds or float("inf"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
