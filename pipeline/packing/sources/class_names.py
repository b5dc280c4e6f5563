"""Read the names of classes from lines of an id and a name."""

import csv
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.packing.sources.listing import SourceError

_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # by the byte order mark
_DELIMITERS = ("\t", ",", ";")


def parse_class_names(lines: Sequence[str]) -> dict[str, str]:
    """Return names by class id from lines of a class id, white space and a name. A tab ends the name."""
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[0]: pair[1].split("\t")[0].strip() for pair in pairs if len(pair) == 2}


def read_class_names(path: Path, classes: Collection[str]) -> dict[str, str]:
    """Read the file of --class-names; return the names by id, also of ids that are not among the classes.

    White space, a tab, a comma or a semicolon is between id and name: the one that fits most classes, whose
    ids may contain the others. Raises SourceError if the file cannot be read.
    """
    try:
        content = path.read_bytes()
        text = content.decode(_ENCODINGS.get(content[:2], "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--class-names {path} cannot be read: {error}") from None
    lines = text.splitlines()
    found = [parse_class_names(lines), *(_of_columns(lines, delimiter) for delimiter in _DELIMITERS)]
    return max(found, key=lambda names: len(names.keys() & set(classes)))


def _of_columns(lines: Sequence[str], delimiter: str) -> dict[str, str]:
    """Parse lines whose first two columns are a class id and its name; either may be quoted."""
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return {}
    return {row[0].strip(): row[1].strip() for row in rows if len(row) > 1 and row[1].strip()}
