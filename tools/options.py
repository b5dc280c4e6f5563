"""Argument types and helpers for argparse that the commands share.

A value that is out of range is refused when the command line is parsed, before any work begins.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


def command_parser(description: str | None, **more: Any) -> argparse.ArgumentParser:
    """Return the parser of a command. description: its module's docstring. more: for ArgumentParser."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False, **more)


def count(text: str, minimum: int = 1) -> int:
    """Parse a whole number of at least `minimum`, for argparse's `type`."""
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {minimum}")
    return int(text)


natural = partial(count, minimum=0)


def positive(text: str) -> float:
    """Parse a finite number above 0, for argparse's `type`."""
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def within(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Return an argparse `type` for numbers of that kind from `low` to `high`, both included."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    return number


def fraction(text: str) -> float:
    """Parse a number strictly between 0 and 1, for argparse's `type`."""
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")


def add_seeds(parser: argparse.ArgumentParser, default: int = 3, note: str = "") -> None:
    """Add --seeds. note: more about the default."""
    text = f"number of seeds, 0 to N−1 (default {default}{note})"
    parser.add_argument("--seeds", type=count, default=default, metavar="N", help=text)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Add --jobs, for commands that train several runs."""
    text = "number of runs trained at the same time (default 1)"
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    text = "device to run on (default: the GPU if there is one)"
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=text)


def program() -> str:
    """Return the name this command was started by: `alexnet-train NAME`, or the script's file name."""
    return Path(sys.argv[0]).name


def command_line() -> str:
    """Return this process's command line as it can be typed again in a shell."""
    name, *arguments = sys.argv
    return (
        f"{f'python {shlex.quote(name)}' if name.endswith('.py') else name} {shlex.join(arguments)}".rstrip()
    )
