"""Phrases for messages: lists of names, and numbers with what they count."""

from collections.abc import Iterable

_MAX_NAMES = 5


def join_names(names: Iterable[str]) -> str:
    """Join names by commas. Of more than five, only the first five and the number of the others are given."""
    names = list(names)
    joined, others = ", ".join(names[:_MAX_NAMES]), len(names) - _MAX_NAMES
    return f"{joined} and {others:,} more" if others > 0 else joined


def pluralize(number: int, singular: str, plural: str) -> str:
    """Return a number and the noun that it counts, such as `1 class` or `1,000 classes`."""
    return f"{number:,} {singular if number == 1 else plural}"
