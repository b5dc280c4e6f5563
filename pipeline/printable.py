"""Turn paths into text that can be printed or sent, whatever bytes they contain."""

from pathlib import Path


def as_text(path: str | Path) -> str:
    """Return a path as valid Unicode, in which bytes that are not UTF-8 are written as \\xNN."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def in_line(path: str | Path) -> str:
    """Return a path as text without the characters that would break a line or control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in as_text(path))
