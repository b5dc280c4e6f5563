"""List runs with their errors, speed and settings: as a table, and as a page with curves.

    alexnet-train runs                                   # the runs in the folder runs, last changed first
    alexnet-train runs runs/a sweeps --sort best --html runs.html

The page is one file that loads nothing else: open it in a browser, or send it to someone. Its columns can be
sorted, too. Runs that are still being trained are listed as they are now.
"""

import argparse
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.files import atomic_write
from pipeline.output import printed, say, secure
from pipeline.printable import in_line
from pipeline.remote_errors import reason_in_full
from tools.listing.columns import BY_NAME, ordered
from tools.listing.find import find
from tools.listing.page import page
from tools.listing.table import table
from tools.options import command_parser


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="FOLDER",
        help="folder of a run, or one with runs at any depth (default runs)",
    )
    parser.add_argument(
        "--sort",
        choices=BY_NAME,
        default="changed",
        metavar="COLUMN",
        help=f"column to sort by: {', '.join(BY_NAME)} (default changed). Errors and losses begin with the "
        "smallest, other numbers and times with the largest",
    )
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a table and curves, too")
    return parser.parse_args()


def main() -> None:
    """List the runs. The exit code is 1 if a run cannot be read or the page cannot be written."""
    secure()
    options = parse_arguments()
    found = find(options.folders)
    column = BY_NAME[options.sort]
    runs = ordered(found.runs, column, options.reverse)
    try:
        if runs:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            with printed():
                print(table(runs, width))
        if options.html and runs:
            with atomic_write(options.html) as file:
                file.write(page(runs, found.problems, column, options.reverse).encode())
            say(f"wrote {in_line(options.html)}")
    except OSError as error:
        found.problems.append(in_line(reason_in_full(error, options.html)))
    for problem in found.problems:
        say(problem)
    sys.exit(1 if found.problems else 0)


if __name__ == "__main__":
    main()
