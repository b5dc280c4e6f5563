"""Read the ranks of this process, which torchrun, or a launcher like it, sets in the environment."""

import os
from typing import NamedTuple

_MAX = 2**31 - 1


class RanksError(ValueError):
    """The variables of torchrun in the environment are not valid; the message names one of them."""


class Ranks(NamedTuple):
    """The ranks of a process, and the numbers of processes; `local` means on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    is_launched: bool  # whether a launcher started this process


def read_ranks() -> Ranks:
    """Return the ranks of this process. Without any variables, it is the only process.

    Raises RanksError, which names the variable, if one is missing or has an impossible value.
    """
    world_size = _number("WORLD_SIZE", default=1, minimum=1)
    local_world_size = _number("LOCAL_WORLD_SIZE", default=1, minimum=1)
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise _error(f"WORLD_SIZE={world_size} is set in the environment, but {name} is not")
        _number("MASTER_PORT", default=1, minimum=1, maximum=65535)
    if local_world_size > world_size:
        raise _error(
            f"LOCAL_WORLD_SIZE={local_world_size} in the environment is more than WORLD_SIZE, {world_size}"
        )
    rank = _number("RANK", default=0, minimum=0, maximum=world_size - 1)
    limit = local_world_size if "LOCAL_WORLD_SIZE" in os.environ else world_size
    local_rank = _number("LOCAL_RANK", default=0, minimum=0, maximum=limit - 1)
    return Ranks(rank, world_size, local_rank, local_world_size, "WORLD_SIZE" in os.environ)


def _number(name: str, *, default: int, minimum: int, maximum: int = _MAX) -> int:
    """Return the value of an environment variable. Raises RanksError if it is out of range."""
    text = os.environ.get(name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX))
    if not is_number or not minimum <= int(text) <= maximum:
        allowed = f"a whole number from {minimum} to {maximum}"
        if minimum == maximum:
            allowed = f"{minimum}, the only possible value for one process"
        raise _error(f"{name}={text[:60]} in the environment is not {allowed}")
    return int(text)


def _error(problem: str) -> RanksError:
    return RanksError(f"{problem}: unset it to train without torchrun, or start all processes with torchrun")
