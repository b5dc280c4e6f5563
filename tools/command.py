"""The entry point `alexnet-train`, which runs every command of the project.

    alexnet-train --data shards --out runs/a      trains; so does alexnet-train train --data …
    alexnet-train make-shards --help

A command's module is imported only when that command is chosen, so that no help text waits for the imports of
another command.
"""

import signal
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

from pipeline import __version__
from pipeline.names import ROOT
from pipeline.output import secure


class Command(NamedTuple):
    """A module whose `main()` reads sys.argv, and what the command does, in one line."""

    module: str
    summary: str


TRAINER = "trainer.cli"  # handles its own commands, and trains where none is named
COMMANDS = {
    "train": Command(TRAINER, "train AlexNet on packed shards, or resume a run"),
    "evaluate": Command(TRAINER, "measure the top-1 and top-5 error of a run's checkpoint"),
    "demo": Command(TRAINER, "draw pictures, pack them, train and evaluate; needs no data"),
    "make-shards": Command("tools.make_shards", "pack images into WebDataset shards"),
    "verify-shards": Command("tools.verify_shards", "check every byte of a packed dataset"),
    "inspect-shards": Command("tools.inspect_shards", "report a dataset's classes, sizes and duplicates"),
    "runs": Command("tools.runs", "list runs with their errors and speed, in the terminal or as a page"),
    "classify": Command("tools.classify", "classify pictures and videos with a trained net"),
    "export": Command("tools.export", "export a trained net to ONNX, torch.export or torchvision's format"),
    "import-weights": Command("tools.import_weights", "turn published weights of AlexNet into a run"),
    "doctor": Command(
        "tools.doctor", "say whether a run can work here, what limits it and how long it takes"
    ),
    "bench": Command("tools.bench", "measure the throughput of each stage on this machine"),
    "paper": Command("tools.paper", "repeat an experiment of the paper, or report on all of them"),
    "compare-recipes": Command("tools.compare_recipes", "compare the errors of recipes over several seeds"),
    "draw-pictures": Command("tools.draw_pictures", "draw a small labelled dataset for trying things out"),
}


def main() -> None:
    """Run the command that the first argument names; without one, train."""
    secure()
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"alexnet-train {__version__}")
        return
    if not name or name.startswith("-"):
        name = "train"
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the commands are {', '.join(COMMANDS)}"
        print(f"alexnet-train: unknown command '{name}'; {hint}", file=sys.stderr)
        sys.exit(2)
    module = COMMANDS[name].module
    if module != TRAINER:
        sys.argv = [f"alexnet-train {name}", *arguments[1:]]  # argparse calls the program by sys.argv[0]
    try:
        import_module(ROOT + module).main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def usage() -> str:
    """Return the text of `alexnet-train --help`."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: alexnet-train [COMMAND] [OPTION …]",
            "",
            "Train AlexNet as published in 2012. Without a command, options are those of train.",
            "",
            "commands:",
            *(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "options:",
            f"  {'-h, --help':{width}}show this help and exit",
            f"  {'--version':{width}}show the version and exit",
            "",
            "`alexnet-train train --help` lists the settings of a training run, and",
            "`alexnet-train COMMAND --help` the options of any other command.",
        ]
    )


if __name__ == "__main__":
    main()
