"""Read the small text files of a run, a recipe or a cache: as a whole, in UTF-8, with the expected structure.

Editors, other programs and power cuts leave files that are empty, cut short, in another encoding, or of
another structure. Each of these is a ContentError, whose message names the file and what is wrong with it.
"""

import codecs
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.retry import read_with_retries

T = TypeVar("T")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 in little-endian order begins like the first


class ContentError(ValueError):
    """A file whose content cannot be used. The message names the file and says why."""


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark. Raises ContentError, or OSError."""
    content = read_with_retries(path)
    if content.startswith(_UTF_16):
        raise ContentError(f"{path} is in UTF-16, not in UTF-8: convert it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"byte 0x{content[error.start]:02x} in line {line}"
        raise ContentError(f"{path} is not in UTF-8, but perhaps in Latin-1 ({where}): convert it") from None
    if "\0" in text:
        raise ContentError(f"{path} is damaged (it has zero bytes, as after a power cut or in UTF-16)")
    return text


def read_json(path: Path, structure: TypeAdapter[T]) -> T:
    """Read a JSON file of a given structure. Raises ContentError, or OSError."""
    content = _parsed(path, json.loads, "is damaged")
    try:
        return structure.validate_python(content)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join([path.name, *map(str, detail["loc"])])
        what = "not a JSON object" if detail["type"] == "model_type" else detail["msg"]
        raise ContentError(f"{path} is damaged ({where}: {what})") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ContentError, or OSError."""
    return _parsed(path, tomllib.loads, "is not valid TOML")


def _parsed(path: Path, parse: Callable[[str], Any], refusal: str) -> Any:
    text = read_text(path)
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{path} {refusal} ({error if text.strip() else 'it is empty'})") from None
