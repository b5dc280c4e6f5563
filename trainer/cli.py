"""The command `alexnet-train` with its subcommands train (the default), evaluate and demo.

It prints help, and errors that it can find early, before it imports torch, which takes seconds.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from pipeline.documents import ContentError
from pipeline.files import close_quietly, held_open
from pipeline.locations import location_of
from pipeline.manifest import DatasetError
from pipeline.messages import one_line
from pipeline.mixture import is_present, read_data
from pipeline.names import ROOT
from pipeline.output import printed, secure
from pipeline.remote_errors import reason_in_full
from trainer.initial import with_initial_net
from trainer.preflight import check_data
from trainer.processes.launch import end_process, is_in_group, launch, report_error, world_size
from trainer.processes.ranks import read_ranks
from trainer.processes.stop import Stopped
from trainer.processes.watchdog import EXIT_STALLED
from trainer.run import PeerLostError, Run, RunError
from trainer.setting_sources import load_settings
from trainer.settings import SettingsError, validated

DESCRIPTION = """Train AlexNet on a dataset that `alexnet-train make-shards` packed, or continue the run
in --out. Every setting can also be given as an environment variable: ALEXNET_EPOCHS=90 is the same
as --epochs 90. `alexnet-train --help` lists the other commands."""


def main() -> None:
    """Run the command line.

    An error that the user can fix is one line on stderr and exit code 1 or 2. A run that was asked to stop
    and has saved its checkpoint exits with 143 after SIGTERM, 130 after SIGINT, 129 after SIGHUP and 138
    after SIGUSR1.
    """
    secure()
    commands = {"train": _train, "evaluate": _evaluate, "demo": _demo}
    arguments = sys.argv[1:]
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    try:
        if command not in commands:
            raise SettingsError(f"unknown command '{command}': choose from {', '.join(commands)}")
        commands[command](arguments)
    except SettingsError as error:
        _fail(error, 2)
    except PeerLostError as error:
        _fail(error, EXIT_STALLED)
    except (DatasetError, RunError, ContentError) as error:
        _fail(error, 1)
    except OSError as error:
        _fail(f"{reason_in_full(error)}: fix the cause and run the same command again", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            _crash(error)
        _fail(f"{one_line(error)}: use a smaller --batch or --evaluation-batch, or more GPUs", 1)
    except Stopped as stopped:
        end_process(stopped.exit_code)
    except KeyboardInterrupt:
        os._exit(130)  # at once: a normal exit would abort if a thread is writing a checkpoint
    except Exception as error:  # a defect
        _crash(error)


def _is_lack_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # it has not been imported if nothing was trained or evaluated
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _fail(error: object, code: int) -> NoReturn:
    report_error(f"alexnet-train: {error}", code)
    end_process(code)


def _crash(error: Exception) -> NoReturn:
    """End with the traceback of a defect."""
    if not is_in_group():
        raise error
    traceback.print_exception(error)
    end_process(1)


def _train(arguments: Sequence[str]) -> None:
    settings = with_initial_net(load_settings(arguments, description=DESCRIPTION))
    world = world_size(settings)
    manifest = check_data(settings, world)
    run = Run(settings.run_folder)
    if world > 1 and not read_ranks().is_launched:
        close_quietly(run.begin(settings, manifest))  # reports errors before any process starts
        command = [sys.executable, "-m", f"{ROOT}trainer.cli", "train", *arguments]
        sys.exit(launch(command, world, settings.max_restarts))
    with nullcontext() if read_ranks().rank else held_open(run.begin(settings, manifest)):
        from trainer.train import train

        train(settings, run)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="alexnet-train evaluate",
        description="Evaluate a checkpoint of a run: top-1 error, top-5 error and loss.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of the run.")
    parser.add_argument(
        "--data",
        type=location_of,
        metavar="DIR | URL",
        help="Dataset to use instead of the one that the run was trained on.",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="Folder for the shards of a dataset behind a URL. (default: that of the run)",
    )
    parser.add_argument(
        "--split", default="val", metavar="NAME", help="Split of the dataset to evaluate. (default: val)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        choices=(1, 10),
        default=1,
        help="Evaluate the centre crop, or average predictions over ten crops as in the paper. (default: 1)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="Evaluate the newest checkpoint, or the one with the lowest top-1 error. (default: newest)",
    )
    parser.add_argument(
        "--device",
        metavar="{auto,cuda,cuda:N,cpu}",
        help="Device to evaluate on. (default: that of the run)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="Folder for the errors by class, the confusion matrix and the most confident mistakes.",
    )
    options = parser.parse_args(arguments)
    settings = Run(options.run).settings()
    if options.out and (options.out / "settings.json").exists():
        raise SettingsError(
            f"--out {options.out} is the folder of a run, whose report it would change: choose another"
        )
    if options.data:
        settings = settings.model_copy(update={"data": options.data})
    elif not is_present(settings.data):
        raise SettingsError(
            f"{options.run} was trained on {settings.data}, which no longer holds a dataset: "
            "give the folder of the dataset with --data"
        )
    if options.cache:
        settings = settings.model_copy(update={"cache": options.cache})
    if options.device:
        settings = settings.model_copy(update={"device": validated({"device": options.device}).device})
    read_data(settings.data).split(options.split)

    from trainer.evaluate import evaluate_run

    best = options.checkpoint == "best"
    result = evaluate_run(settings, Run(options.run), options.split, options.crops, best, options.out)
    if not read_ranks().rank:
        with printed():
            print(result)


def _demo(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="alexnet-train demo",
        description="Draw pictures, pack them, train on them and evaluate the net. This needs no data.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/demo"),
        help="Folder for the pictures, the packed dataset and the run. (default: runs/demo)",
    )
    options = parser.parse_args(arguments)

    from trainer.demo import demo

    sys.exit(demo(options.out))


if __name__ == "__main__":
    main()
