"""Read class ids from tables, check them, and put them in order."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Number

from pipeline.messages import join_names
from pipeline.packing.sources.listing import SourceError

_MISSING = {"", "nan", "NaN", "NaT", "None", "<NA>", "null", "NULL"}  # as Python, pandas and SQL write it
_CONTROLS = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are not UTF-8, and line breaks


def class_id(label: object) -> str | None:
    """Return the class id that a table's label stands for, or None if it stands for none.

    Blanks around a text do not count. A whole number is written without a fraction, since pandas turns a
    column of whole numbers into floating point when one is missing.
    """
    if isinstance(label, str):
        text = label.strip()
        return None if text in _MISSING else text
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, Number):
        try:
            whole = int(label)  # type: ignore[call-overload]
        except (ValueError, OverflowError):  # NaN or infinite
            return None
        return str(whole) if whole == label else str(label)
    return None


def without_fractions(ids: Sequence[str]) -> Sequence[str]:
    """Remove `.0` from class ids if all are whole numbers, as in a CSV table that pandas wrote."""
    if all(re.fullmatch(r"[0-9]+(\.0+)?", each) for each in ids):
        return [each.partition(".")[0] for each in ids]
    return ids


def sort_classes(ids: Iterable[str]) -> list[str]:
    """Sort class ids: numerically if all are decimal numbers, so that 2 precedes 10, else alphabetically."""
    ids = list(ids)
    if all(re.fullmatch("[0-9]{1,18}", each) for each in ids):
        return sorted(ids, key=lambda each: (int(each), each))
    return sorted(ids)


def check_printable(ids: Iterable[str], location: str) -> None:
    """Raise SourceError for class ids with characters that cannot be shown in a line of text.

    Format characters are allowed, because scripts need them: Persian, for example, the zero-width non-joiner.
    """
    bad = [each for each in ids if _CONTROLS & set(map(unicodedata.category, each))]
    if bad:
        names = join_names(map(repr, bad))
        raise SourceError(
            f"classes in {location} have control characters or line breaks in their names: rename {names}"
        )


def check_no_lookalikes(ids: Iterable[str], location: str) -> None:
    """Raise SourceError for ids that look the same but differ, such as é and e with a combining accent."""
    seen: dict[str, str] = {}
    for each in ids:
        other = seen.setdefault(unicodedata.normalize("NFC", each), each)
        if other != each:
            raise SourceError(
                f"{location}: the classes {other!a} and {each!a} look alike: both are {each}, in two Unicode "
                "normal forms (NFC, and NFD as macOS writes it): rename one, or merge them"
            )


def confusable_pairs(ids: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of class ids that differ only in capitals, blanks or characters that are not shown."""
    seen: dict[str, str] = {}
    pairs = []
    for each in ids:
        visible = (char for char in each if unicodedata.category(char) != "Cf")
        key = " ".join(unicodedata.normalize("NFKC", "".join(visible)).casefold().split())
        if (other := seen.setdefault(key, each)) != each:
            pairs.append((other, each))
    return pairs
