"""The paper's experiments, each on any packed dataset, and one report of all that was run.

    python tools/paper.py ablations --data shards --recipe small --seeds 3
    python tools/paper.py report

    crops       ten crops of a picture against its centre
    ensembles   averages of several nets
    cnn-star    a sixth convolution, pre-trained on another dataset, fine-tuned
    baselines   Fisher vectors and sparse codes, the first rows of the tables
    ablations   what each part of the net and of its training is worth
    figure1     how much sooner a net learns with ReLUs than with tanh
    figure3     the kernels of the first layer, by tower
    figure4     the top five of validation images, and the training images nearest to them
    codes       retrieval by short binary codes of an auto-encoder
    towers      the net on two devices, as in Fig. 2, beside the same net on one
    report      results.md of all that was run, the published numbers beside those that were measured

An experiment leaves a record, its pictures and its trainings in --out; the same command goes on with what
was interrupted. `python tools/paper.py ablations --help` says what one takes.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError
from tools.experiments import EXPERIMENTS
from tools.experiments.record import Record, RecordError
from tools.experiments.training import TrainingError
from tools.options import program
from trainer.run import RunError
from trainer.settings import SettingsError

MODULES = {"towers": "two_towers", "report": "summary"}  # where the module has another name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "report"))
    experiment = parser.parse_args(sys.argv[1:2]).experiment
    module = import_module(f"tools.experiments.{MODULES.get(experiment, experiment.replace('-', '_'))}")

    parser = argparse.ArgumentParser(
        prog=f"{program()} {experiment}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="default runs/paper"
    )
    module.add_arguments(parser)
    options, settings = parser.parse_known_args(sys.argv[2:])
    if settings and not module.TAKES_SETTINGS:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        result = module.run(options, settings)
        if isinstance(result, Record):
            result.save(options.out)
        print(result)
    except (SettingsError, DatasetError, RunError, RecordError, TrainingError, OSError) as error:
        sys.exit(f"paper: {error}")


if __name__ == "__main__":
    main()
