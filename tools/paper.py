"""Repeat an experiment of the paper on any packed dataset, or report on all experiments that were run.

    alexnet-train paper ablations --data shards --recipe small --seeds 3
    alexnet-train paper report

    crops          ten crops of each picture, compared with the centre crop
    ensembles      the averaged predictions of several nets
    cnn-star       a net with a sixth convolution, pre-trained on another dataset and fine-tuned
    baselines      Fisher vectors and sparse codes, the first rows of the paper's tables
    ablations      the error without each part of the net and of its training
    figure1        how much faster a net learns with ReLU than with tanh
    cifar10        the net that the author published for CIFAR-10, whose error is 18 %
    normalisation  the four-layer net for CIFAR-10 with and without response normalisation
    figure3        the kernels of the first layer, by tower
    figure4        the five most probable classes of validation images, and their nearest training images
    codes          image retrieval by short binary codes from an auto-encoder
    towers         the net on two devices, as in Fig. 2, compared with the same net on one
    report         writes README.md, the paper's claims with verdicts, and results.md, all that was measured

An experiment writes a record, pictures and its training runs to --out. Running the same command again resumes
an interrupted experiment. `alexnet-train paper NAME --help` lists the options of one experiment.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.manifest import DatasetError
from pipeline.names import ROOT
from pipeline.output import secure
from pipeline.remote_errors import reason_in_full
from tools.experiments import EXPERIMENTS
from tools.experiments.markdown import section
from tools.experiments.record import Record, RecordError
from tools.experiments.training import TrainingError
from tools.options import command_parser, program
from trainer.run import RunError
from trainer.settings import SettingsError

MODULES = {"towers": "two_towers", "report": "summary"}  # where the module has another name


def main() -> None:
    secure()
    parser = command_parser(__doc__)
    parser.add_argument(
        "experiment", choices=(*EXPERIMENTS, "report"), metavar="NAME", help="an experiment, or report"
    )
    experiment = parser.parse_args(sys.argv[1:2]).experiment
    if not find_spec("scipy"):
        sys.exit("paper: confidence intervals need scipy: run pip install 'alexnet-train[paper]'")
    module = import_module(f"{ROOT}tools.experiments.{MODULES.get(experiment, experiment.replace('-', '_'))}")

    parser = command_parser(module.__doc__, prog=f"{program()} {experiment}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/paper"),
        metavar="DIR",
        help="output folder (default runs/paper)",
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
            result = section(result)
        print(result)
    except (SettingsError, DatasetError, RunError, RecordError, TrainingError) as error:
        sys.exit(f"paper: {error}")
    except OSError as error:
        sys.exit(f"paper: {reason_in_full(error, options.out)}")


if __name__ == "__main__":
    main()
