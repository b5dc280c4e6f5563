"""The place of a process among those of its run, as torchrun or `launch` gives it in the environment."""

import os
from typing import NamedTuple

from trainer.settings import SettingsError

_MOST = 2**31 - 1


class Place(NamedTuple):
    """Ranks and numbers of processes; `local` means on this machine. A single process needs no variables."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    is_given: bool  # whether a launcher started this process


def place() -> Place:
    """Read this process's place. Raises SettingsError, which names the variable, if it makes no sense."""
    size, local_size = _number("WORLD_SIZE", 1, 1), _number("LOCAL_WORLD_SIZE", 1, 1)
    is_given = "WORLD_SIZE" in os.environ
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise _refusal(f"WORLD_SIZE={size} is set in the environment, but {name} is not")
        _number("MASTER_PORT", 1, 1, 65535)
    if local_size > size:
        raise _refusal(f"LOCAL_WORLD_SIZE={local_size} in the environment is more than WORLD_SIZE, {size}")
    here = local_size if "LOCAL_WORLD_SIZE" in os.environ else size
    rank, local_rank = _number("RANK", 0, 0, size - 1), _number("LOCAL_RANK", 0, 0, here - 1)
    return Place(rank, size, local_rank, local_size, is_given)


def _number(name: str, otherwise: int, least: int, most: int = _MOST) -> int:
    text = os.environ.get(name)
    if text is None:
        return otherwise
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST))
    if not is_number or not least <= int(text) <= most:
        allowed = f"a whole number from {least} to {most}" if most > least else f"{least}, as for one process"
        raise _refusal(f"{name}={text[:60]} in the environment is not {allowed}")
    return int(text)


def _refusal(what: str) -> SettingsError:
    return SettingsError(f"{what}: unset it to train without torchrun, or start all processes with torchrun")
