"""Short names of classes for pictures, in letters that matplotlib's own font has."""

from collections.abc import Sequence
from functools import cache

from matplotlib.font_manager import findfont, get_font

from pipeline.manifest import Class
from trainer.monitor.names import distinct, shorten


def drawn_names(classes: Sequence[Class], length: int) -> list[str]:
    """Return names as `plain_names` does, in letters that matplotlib's own font has.

    A class has its id instead of a name in other letters, or else `class` and its label.
    """
    return distinct(
        [
            next(
                (shorten(name, length) for name in (each.name, each.id) if _is_drawable(name)),
                f"class {label}",
            )
            for label, each in enumerate(classes)
        ]
    )


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _is_drawable(name: str) -> bool:
    return bool(name) and all(letter.isspace() or ord(letter) in _letters() for letter in name)
