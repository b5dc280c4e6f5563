"""Kill a run again and again, and compare its result with the same run left undisturbed.

    python tests/endurance/chaos.py --data shards --kills 200 --seed 0 --record runs/chaos.json

Each scenario trains a small net without interruption. Then it trains it again with SIGKILLs at random
moments and the same command after each kill, until the run is complete:

    1               on one process
    2               on two; either both are killed, or one, whose end the other must notice
    1 to 1, 2, 4    started on one process and resumed on 1, 2 and 4 in turn
    2 to 1, 2, 4    started on two processes and resumed on 1, 2 and 4 in turn
    alexnet-train   the command and its net, unmodified
    torchrun        the same on two processes, one of which is killed; torchrun restarts them

Kills are aimed at any time, at start-up, at the writing of a checkpoint and at evaluation; the run folder
shows what each of them hit. The exit code is 1 at the first difference, and that run's folder is kept. These
count as differences: losses, weights and the best checkpoint, bit for bit if the number of processes stays
the same; any image that the net was given; a checkpoint that disappeared; saved work that was done again;
files or a lock left behind; a process that does not end. Any other option is a setting of `alexnet-train
train`.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.manifest import DatasetError, read_manifest
from tests.endurance.lives import MOMENTS, SILENCE_SECONDS, DifferenceError
from tests.endurance.record import write_record
from tools.options import command_parser, natural
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

if TYPE_CHECKING:
    from tests.endurance.runs import Tally

# With the pictures that the tests and `make chaos` draw, four checkpoints per epoch.
SETTINGS = [
    "--recipe", "demo", "--crop", "67", "--batch", "8", "--epochs", "8", "--colour", "paper",
    "--device", "cpu", "--threads", "1", "--port", "0", "--stall-seconds", str(SILENCE_SECONDS),
    "--log-every", "1", "--checkpoint-steps", "2",
]  # fmt: skip


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--kills", type=natural, default=200, metavar="N", help="kills in the first four (default 200)")
    add("--command-kills", type=natural, default=2, metavar="N", help="kills in each other (default 2)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the kills (default 0)")
    folder = Path("runs/chaos")
    add("--folder", type=Path, default=folder, metavar="DIR", help="of the runs (default runs/chaos)")
    add("--record", type=Path, metavar="FILE", help="also append the last line to this file")
    return parser.parse_known_args()


def table(tallies: "dict[str, Tally]") -> Iterator[str]:
    """Yield a table of what the kills hit, and of each scenario's result."""
    yield f"{'kills in':16}" + "".join(f"{moment:>18}" for moment in MOMENTS) + f"{'all':>7}"
    for name, tally in tallies.items():
        moments = "".join(f"{tally.kills[moment]:>18}" for moment in MOMENTS)
        yield f"{name:16}{moments}{tally.kills.total():>7}"
    yield ""
    columns = ("runs", 6), ("lives", 7), ("one rank", 10), ("others after", 14), ("twice", 7), ("at once", 9)
    yield f"{'':16}" + "".join(f"{name:>{width}}" for name, width in columns) + "  losses"
    for name, tally in tallies.items():
        yield (
            f"{name:16}{tally.runs:>6}{tally.lives:>7}{tally.one_rank_kills:>10}"
            f"{tally.longest_end_seconds:>12.1f} s{tally.steps_done_twice:>7}{tally.most_after_a_kill:>9}  "
            + (f"differ by {tally.loss_difference:.1e} at most" if tally.loss_difference else "equal")
        )
    yield "one rank: kills of one rank of several, and the longest time until the others ended"
    yield "twice: steps done again, in total and at most after one kill; not counted for commands"


def kill_all(options: argparse.Namespace, rest: list[str], tallies: "dict[str, Tally]") -> None:
    """Run all scenarios. Raises SettingsError, DatasetError, OSError or DifferenceError."""
    arguments = [*SETTINGS, *rest]
    settings = load_settings(arguments, command="chaos.py")
    read_manifest(settings.data)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise SettingsError(f"{options.folder} is not empty: delete it, or choose another --folder")

    from tests.endurance.elastic import kill_under_torchrun
    from tests.endurance.runs import COMMAND, SCENARIOS, Chaos

    chaos = Chaos(settings, arguments, options.folder, options.seed)
    shares = {scenario: options.kills // len(SCENARIOS) for scenario in SCENARIOS}
    shares[SCENARIOS[0]] += options.kills % len(SCENARIOS)
    shares[COMMAND] = options.command_kills
    for scenario, kills in shares.items():
        if kills:
            tallies[scenario.name] = chaos.kill(scenario, kills)
            print(f"{scenario.name}: {kills} kills, same result as without", flush=True)
    if options.command_kills:
        tallies["torchrun"] = kill_under_torchrun(chaos, options.command_kills)
        print(f"torchrun: {options.command_kills} kills, same result as without", flush=True)
    shutil.rmtree(options.folder)


def main() -> None:
    options, rest = parse_arguments()
    begun = time.monotonic()
    tallies: dict[str, Tally] = {}
    try:
        kill_all(options, rest, tallies)
    except (SettingsError, DatasetError, OSError, DifferenceError) as error:
        sys.exit(f"chaos: {error}")
    finally:
        if tallies:
            print(*table(tallies), sep="\n")
    scenarios = {name: vars(tally) for name, tally in tallies.items()}
    write_record(begun, {"scenarios": scenarios}, options.record)


if __name__ == "__main__":
    main()
