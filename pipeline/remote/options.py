"""Where the cache of remote datasets is, and how large it may become."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from pipeline.locations import cache_folder

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024 ** (power + 1) for power, unit in enumerate("KMGT")}
_FREE_SHARE = 0.9  # of the free space, which the cache may take by default


class CacheOptions(NamedTuple):
    """folder: by default in the user's cache folder. size: in bytes, by default 90 % of the free space."""

    folder: Path | None = None
    size: int | None = None

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        return self.folder or cache_folder() / "data"


def parse_size(text: str) -> int:
    """Return the number of bytes that a size such as 200GB, 1.5TB, 512MiB or 1000000 means.

    Raises ValueError if it is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", text.strip().upper())
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ValueError("input should be a size, such as 200GB or 512MiB")
    return size


def default_size(folder: Path, used: int) -> int:
    """Return the size in bytes of a cache whose size is not given.

    folder: an existing folder on the disk of the cache. used: the size of what the cache already holds, in
    bytes.
    """
    return used + int(shutil.disk_usage(folder).free * _FREE_SHARE)
