"""Short names of classes for tables and pictures."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

from matplotlib.font_manager import findfont, get_font

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
    return _unlike([shorten(each.name or each.id, length) for each in classes])


def drawn_names(classes: Sequence[Class], length: int) -> list[str]:
    """Return names as `plain_names` does, in letters that matplotlib's own font has.

    A class has its id instead of a name in other letters, or else `class` and its label.
    """
    return _unlike(
        [
            next(
                (shorten(name, length) for name in (each.name, each.id) if _is_drawable(name)),
                f"class {label}",
            )
            for label, each in enumerate(classes)
        ]
    )


def _unlike(names: Iterable[str]) -> list[str]:
    names = list(names)
    times = Counter(names)
    return [f"{label} {name}" if times[name] > 1 else name for label, name in enumerate(names)]


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _is_drawable(name: str) -> bool:
    return bool(name) and all(letter.isspace() or ord(letter) in _letters() for letter in name)
