"""Compare the accuracy of recipes, each trained with several seeds: a table of errors, then JSON.

    alexnet-train compare-recipes fast code2012 --data shards --seeds 3 --within 1.0

Errors are those of the last validation, in percent: the mean over the seeds, with the minimum and the
maximum. The differences from the first recipe have a 95 % interval over the seeds, if there are several and
scipy is installed. With --within POINTS the exit code is 1 if the first recipe's mean top-1 error exceeds
another's by more than POINTS percentage points. With --rates, the learning rate of each recipe is first
chosen on training images that are held out. Recipes are names or TOML files; any other option is a setting
of `alexnet-train train`, the same for all recipes. Running the same command again resumes interrupted runs
and does not repeat finished ones.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError
from pipeline.output import printed, secure
from tools.experiments import rates
from tools.experiments.intervals import interval
from tools.experiments.training import Training, TrainingError, train_all
from tools.options import add_jobs, add_seeds, command_line, command_parser, program, within
from trainer.run import Run, RunError
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

MEASURES = ("top1_error", "top5_error")

Scores = dict[str, list[float]]  # measure → a value for each seed


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="recipe names or TOML files; the first is compared with the others",
    )
    add_seeds(parser)
    add(
        "--out",
        type=Path,
        default=Path("runs/compared"),
        metavar="DIR",
        help="folder for the run folders (default runs/compared)",
    )
    add_jobs(parser)
    rates.add_arguments(parser)
    add(
        "--within",
        type=within(float, -100, 100),
        metavar="POINTS",
        help="exit with 1 if the first recipe is worse than another by more than this many percentage points",
    )
    options, settings = parser.parse_known_args()
    if len({Path(recipe).stem for recipe in options.recipes}) < len(options.recipes):
        parser.error("two recipes have the same name")
    own = {"--seed": "--seeds", "--recipe": "the names of the recipes"}
    if options.rates:
        own["--learning-rate"] = "--rates"
    for name in (word.partition("=")[0] for word in settings):
        if name in own:
            parser.error(f"{name} would be the same for all runs: use {own[name]}")
    return options, settings


def compare(
    options: argparse.Namespace, settings: list[str], systems: dict[str, list[str]]
) -> dict[str, Scores]:
    """Train the recipes and return the scores of each, in percent. systems: each recipe's own settings."""
    names = list(systems)
    trainings = [
        Training(options.out / f"{name}-{seed}", [*own, "--seed", str(seed), *settings])
        for seed in range(options.seeds)
        for name, own in systems.items()
    ]
    evaluations = train_all(trainings, options.jobs)
    return {
        name: {
            measure: [100 * evaluation[measure] for evaluation in evaluations[number :: len(names)]]
            for measure in MEASURES
        }
        for number, name in enumerate(names)
    }


def table(scores: dict[str, Scores]) -> Iterator[str]:
    """Yield a line for each recipe; points are its mean top-1 error minus the first recipe's."""
    first, *_ = scores
    for name, measured in scores.items():
        columns = (
            f"{measure[:4]} {mean(values):5.1f} % ({min(values):.1f} to {max(values):.1f})"
            for measure, values in measured.items()
        )
        pairs = zip(measured["top1_error"], scores[first]["top1_error"], strict=True)
        points = [own - other for own, other in pairs]
        line = f"{name:20}{'   '.join(columns)}   {mean(points):+.1f} points"
        if name != first and len(points) > 1 and find_spec("scipy"):
            _, low, high = interval(points)
            line += f" ({low:+.1f} to {high:+.1f})"
        yield line


def main() -> None:
    secure()
    options, settings = parse_arguments()
    try:
        systems = {Path(recipe).stem: ["--recipe", recipe] for recipe in options.recipes}
        for own in systems.values():
            load_settings([*own, *settings], command=program())
        first = next(iter(systems.values()))
        sweep = rates.sweep(options, [*first, *settings], systems, options.out / "rates")
        systems = {name: [*own, *sweep.setting(name)] for name, own in systems.items()}
        scores = compare(options, settings, systems)
        record = {
            "command": command_line(),
            "environment": Run(options.out / f"{next(iter(scores))}-0").starts()[-1],
            "trials": [trial.model_dump() for trial in sweep.trials],
            "percent": scores,
        }
        with printed():
            print(*sweep.remarks(), *table(scores), sep="\n")
            print(json.dumps(record))
    except (SettingsError, DatasetError, RunError, TrainingError, OSError) as error:
        sys.exit(f"compare-recipes: {error}")
    leading, *others = (mean(measured["top1_error"]) for measured in scores.values())
    sys.exit(options.within is not None and any(leading - other > options.within for other in others))


if __name__ == "__main__":
    main()
