"""Values of options, for argparse: what is out of range is refused before anything begins."""

import argparse
import math
from functools import partial


def count(text: str, least: int = 1) -> int:
    """A number of things."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
    return int(text)


natural = partial(count, least=0)


def positive(text: str) -> float:
    """A finite value above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
