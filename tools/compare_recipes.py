"""Does a recipe cost accuracy? Each is trained from several seeds: a table of errors, then JSON.

    python tools/compare_recipes.py fast code2012 --data shards --seeds 3 --within 1.0

Errors are those of the last validation, in percent: the mean over the seeds, with the least and the
greatest. --within ends with 1 if the first recipe's mean top-1 error is above another's by more points.
Recipes are names or TOML files; other options are settings of alexnet-train, the same for all. The same
command continues what was interrupted, and what is finished is not trained again.
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
from tools.experiments.training import Training, TrainingError, train_all
from tools.options import count, program
from trainer.run import Run
from trainer.settings import SettingsError, load_settings

MEASURES = ("top1_error", "top5_error")

Scores = dict[str, list[float]]  # of each measure, a value a seed


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Also the settings that are left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="the first is compared with the others")
    add("--seeds", type=count, default=3, metavar="N", help="0 to N−1 (default 3)")
    add("--out", type=Path, default=Path("runs/compared"), metavar="DIR", help="a run folder each goes there")
    add("--jobs", type=count, default=1, metavar="N", help="trainings at a time (default 1)")
    add("--within", type=float, metavar="POINTS", help="end with 1 if the first is worse by more")
    options, settings = parser.parse_known_args()
    if len({Path(recipe).stem for recipe in options.recipes}) < len(options.recipes):
        parser.error("two recipes have the same name")
    return options, settings


def compare(options: argparse.Namespace, settings: list[str]) -> dict[str, Scores]:
    """The scores of each recipe, in percent."""
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
    """A line for each recipe; points are those of its mean top-1 error over the first's."""
    first = mean(next(iter(scores.values()))["top1_error"])
    for name, measured in scores.items():
        columns = (
            f"{measure[:4]} {mean(values):5.1f} % ({min(values):.1f} to {max(values):.1f})"
            for measure, values in measured.items()
        )
        points = mean(measured["top1_error"]) - first
        yield f"{name:20}{'   '.join(columns)}   {points:+.1f} points"


def main() -> None:
    options, settings = parse_arguments()
    try:
        for recipe in options.recipes:
            load_settings(["--recipe", recipe, *settings], command=program())
        scores = compare(options, settings)
    except (SettingsError, DatasetError, TrainingError, OSError) as error:
        sys.exit(f"compare_recipes: {error}")
    print(*table(scores), sep="\n")
    about = Run(options.out / f"{next(iter(scores))}-0").starts()[-1]
    print(json.dumps({"command": " ".join(sys.argv), "environment": about, "percent": scores}))
    first, *others = (mean(measured["top1_error"]) for measured in scores.values())
    sys.exit(options.within is not None and any(first - other > options.within for other in others))


if __name__ == "__main__":
    main()
