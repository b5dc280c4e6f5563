"""Say where datasets are: in folders of this machine, which are paths, or behind URLs, which are strings.

A URL cannot be a Path, which would make one slash of two.
"""

import errno
import os
from pathlib import Path

Location = Path | str


def is_url(name: str) -> bool:
    """Return whether a name is a URL, and not a local path."""
    return "://" in name


def location_of(name: str | Path) -> Location:
    """Return the location that a name means."""
    text = str(name)
    return text.rstrip("/") if is_url(text) else Path(name)


def name_of(location: Location) -> str:
    """Return the name of a folder, which is the last part of its path or URL."""
    if isinstance(location, Path):
        return location.resolve().name
    return location.partition("?")[0].rstrip("/").rpartition("/")[2]


def inside(location: Location, name: str) -> Location:
    """Return the location of a file in a folder. The query of a URL, such as a signature, is kept."""
    if isinstance(location, Path):
        return location / name
    url, mark, query = location.partition("?")
    return f"{url.rstrip('/')}/{name}{mark}{query}"


def cache_folder() -> Path:
    """Return the folder for this project's caches. Raises FileNotFoundError if the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet-train"
    except RuntimeError:
        raise FileNotFoundError(
            errno.ENOENT, "this user has no home directory: set XDG_CACHE_HOME", "alexnet-train"
        ) from None
