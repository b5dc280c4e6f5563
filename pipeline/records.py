"""Parse the JSON records that this project writes: dataset.json and net.json.

A record may come back empty, cut off, edited, or written by a later version.
"""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Record = TypeVar("Record", bound=BaseModel)


class RecordError(ValueError):
    """A record that cannot be used. The message names its source and says what to do."""


def parse_record(
    model: type[Record], content: str | bytes, latest: int, source: object, remedy: str
) -> Record:
    """Parse a record in JSON, which has a field `format`.

    latest: the format that this version writes; a record of a later one may mean something else, even if it
    has all the fields. source: what the message names. remedy: a sentence that says what to do about damage.
    Raises RecordError.
    """
    held = _parse_json(content, source, remedy)
    if not isinstance(held, dict):
        raise RecordError(f"{source} is not valid: it is not a JSON object. {remedy}")
    found = held.get("format")
    if isinstance(found, int) and found > latest:
        raise RecordError(
            f"{source} has format {found}, but this version reads format {latest}: upgrade alexnet-train"
        )
    try:
        return model.model_validate(held)
    except ValidationError as error:
        first = error.errors()[0]
        what = [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]
        raise RecordError(f"{source} is not valid: {': '.join(filter(None, what))}. {remedy}") from None


def _parse_json(content: str | bytes, source: object, remedy: str) -> Any:
    if not content.strip():
        raise RecordError(f"{source} is empty. {remedy}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{source} is not valid JSON ({error}). {remedy}") from None
