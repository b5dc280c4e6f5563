"""Compare the accuracy of recipes, each trained with several seeds: a table of errors, then JSON.

    alexnet-train compare-recipes fast code2012 --data shards --seeds 3 --within 1.0

Errors are those of the last validation, in percent: the mean over the seeds, with the minimum and the
maximum. With --within POINTS the exit code is 1 if the first recipe's mean top-1 error exceeds another's by
more than POINTS percentage points. Recipes are names or TOML files; any other option is a setting of
`alexnet-train train`, the same for all recipes. Running the same command again resumes interrupted runs and
does not repeat finished ones.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError
from pipeline.output import printed, secure
from tools.experiments.training import Training, TrainingError, train_all
from tools.options import add_jobs, add_seeds, program
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError

MEASURES = ("top1_error", "top5_error")

Scores = dict[str, list[float]]  # measure → a value for each seed


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the remaining arguments, which are settings of the trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    add(
        "--within",
        type=float,
        metavar="POINTS",
        help="exit with 1 if the first recipe is worse than another by more than this many percentage points",
    )
    options, settings = parser.parse_known_args()
    if len({Path(recipe).stem for recipe in options.recipes}) < len(options.recipes):
        parser.error("two recipes have the same name")
    return options, settings


def compare(options: argparse.Namespace, settings: list[str]) -> dict[str, Scores]:
    """Train the recipes and return the scores of each, in percent."""
    names = [Path(recipe).stem for recipe in options.recipes]
    trainings = [
        Training(options.out / f"{name}-{seed}", ["--recipe", recipe, "--seed", str(seed), *settings])
        for seed in range(options.seeds)
        for name, recipe in zip(names, options.recipes, strict=True)
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
    first = mean(next(iter(scores.values()))["top1_error"])
    for name, measured in scores.items():
        columns = (
            f"{measure[:4]} {mean(values):5.1f} % ({min(values):.1f} to {max(values):.1f})"
            for measure, values in measured.items()
        )
        points = mean(measured["top1_error"]) - first
        yield f"{name:20}{'   '.join(columns)}   {points:+.1f} points"


def main() -> None:
    secure()
    options, settings = parse_arguments()
    try:
        for recipe in options.recipes:
            load_settings(["--recipe", recipe, *settings], command=program())
        scores = compare(options, settings)
        about = Run(options.out / f"{next(iter(scores))}-0").starts()[-1]
        with printed():
            print(*table(scores), sep="\n")
            print(json.dumps({"command": " ".join(sys.argv), "environment": about, "percent": scores}))
    except (SettingsError, DatasetError, TrainingError, OSError) as error:
        sys.exit(f"compare-recipes: {error}")
    first, *others = (mean(measured["top1_error"]) for measured in scores.values())
    sys.exit(options.within is not None and any(first - other > options.within for other in others))


if __name__ == "__main__":
    main()
