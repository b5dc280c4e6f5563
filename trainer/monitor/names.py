"""Short names of classes for tables and pages."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.manifest import Class

_OPENING, _CLOSING = "([{（［【", ")]}）］】"


def shorten(name: str, length: int) -> str:
    """Return the first of a class's names, which commas separate, in at most `length` characters.

    A longer name is cut at a blank or before a bracket, so that no bracket is left open; only a single long
    word is cut within.
    """
    name, depth, ends = " ".join(name.split()), 0, []
    for index, letter in enumerate(name):
        if depth == 0 and letter in (" ", *_OPENING):
            ends.append(index)
        if depth == 0 and letter == "," and index:
            name = name[:index]
            break
        depth = max(0, depth + (letter in _OPENING) - (letter in _CLOSING))
    if len(name) <= length:
        return name
    end = max((end for end in ends if 0 < end < length), default=length - 1)
    return f"{name[:end].rstrip()}…"


def plain_names(classes: Sequence[Class], length: int) -> list[str]:
    """Return a short name for each class; those that would be alike have their label in front of them."""
    return distinct([shorten(each.name or each.id, length) for each in classes])


def distinct(names: Iterable[str]) -> list[str]:
    """Return the names, with the label in front of those that are alike."""
    names = list(names)
    times = Counter(names)
    return [f"{label} {name}" if times[name] > 1 else name for label, name in enumerate(names)]


def as_markdown(text: str) -> str:
    """Escape text for a table cell or a line of Markdown, in which it is then shown as it is."""
    return re.sub(r"([\\`*_\[\]<>&|#~])", r"\\\1", " ".join(text.split()))
