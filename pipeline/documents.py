"""Read small JSON, TOML and text documents in UTF-8, and check their structure.

Editors, other programs and power cuts leave files that are empty, truncated, in another encoding, or of
another structure. Each of these is a ContentError, whose message names the file and what is wrong with it.
"""

import codecs
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.retry import read_with_retries

T = TypeVar("T")
Record = TypeVar("Record", bound=BaseModel)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # little-endian UTF-32 begins as the first does


class ContentError(ValueError):
    """A file whose content cannot be used. The message names the file and says why."""


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without a byte order mark. Raises ContentError, or OSError."""
    return _decoded(read_with_retries(path), path)


def read_json(path: Path, structure: TypeAdapter[T]) -> T:
    """Read a JSON file, and check its structure. Raises ContentError, or OSError."""
    content = _parsed(read_with_retries(path), path, json.loads, "is damaged")
    try:
        return structure.validate_python(content)
    except ValidationError as error:
        where = ".".join([path.name, *map(str, error.errors()[0]["loc"])])
        raise ContentError(f"{path} is damaged ({where}: {message_of(error)})") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ContentError, or OSError."""
    return _parsed(read_with_retries(path), path, tomllib.loads, "is not valid TOML")


def parse_record(
    model: type[Record], content: str | bytes, latest: int, source: object, remedy: str
) -> Record:
    """Parse a record in JSON that has a field `format`, such as dataset.json.

    latest: the format that this version writes. A record of a later format may have another meaning, even if
    it has all the fields. source: the file to name in messages. remedy: a sentence that says what to do about
    damage. Raises ContentError.
    """
    try:
        record = _parsed(content, source, json.loads, "is not valid JSON")
    except ContentError as error:
        raise ContentError(f"{error}. {remedy}") from None
    found = record.get("format") if isinstance(record, dict) else None
    if isinstance(found, int) and found > latest:
        raise ContentError(
            f"{source} has format {found}, but this version reads format {latest}: upgrade alexnet-train"
        )
    try:
        return model.model_validate(record)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))  # empty if the error concerns several fields
        problem = ": ".join(filter(None, (field, message_of(error))))
        raise ContentError(f"{source} is not valid: {problem}. {remedy}") from None


def message_of(error: ValidationError) -> str:
    """Return the message of the first of the errors that pydantic has found."""
    detail = error.errors()[0]
    is_no_object = detail["type"] == "model_type"
    return "not a JSON object" if is_no_object else detail["msg"].removeprefix("Value error, ")


def _decoded(content: str | bytes, source: object) -> str:
    if isinstance(content, str):
        return content
    if content.startswith(_UTF_16):
        raise ContentError(f"{source} is in UTF-16, not in UTF-8: convert it")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x} in line {line}"
        message = f"{source} is not in UTF-8, but perhaps in Latin-1 ({byte}): convert it"
        raise ContentError(message) from None
    if "\0" in text:
        raise ContentError(f"{source} is damaged (it has zero bytes, as after a power cut or in UTF-16)")
    return text


def _parsed(content: str | bytes, source: object, parse: Callable[[str], Any], problem: str) -> Any:
    text = _decoded(content, source)
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{source} {problem} ({error if text.strip() else 'it is empty'})") from None
