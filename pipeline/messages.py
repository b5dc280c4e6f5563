"""Phrases for messages: lists of names, numbers with what they count, and errors on one line."""

from collections.abc import Iterable

_MAX_NAMES = 5
_MAX_LENGTH = 200  # of an error's text


def join_names(names: Iterable[str]) -> str:
    """Join names by commas. Of more than five, only the first five and the number of the others are given."""
    names = list(names)
    joined, others = ", ".join(names[:_MAX_NAMES]), len(names) - _MAX_NAMES
    return f"{joined} and {others:,} more" if others > 0 else joined


def pluralize(number: int, singular: str, plural: str) -> str:
    """Return a number and the noun that it counts, such as `1 class` or `1,000 classes`."""
    return f"{number:,} {singular if number == 1 else plural}"


def one_line(error: BaseException) -> str:
    """Return an error's class and the first 200 characters of its text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_LENGTH]}"
