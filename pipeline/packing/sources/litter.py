"""Recognise the files and folders that desktops, notebooks, NAS boxes and archivers leave among images.

They are passed over in folders, in tars and behind URLs, so they are never classes or rejected files. A table
that lists such a file means it.
"""

import re

_LITTER = (
    # Hidden files and folders: .DS_Store, ._x.jpg, .ipynb_checkpoints, .AppleDouble, .Trash-1000, .nfs0001, …
    r"\.(?!\.?(?:/|\Z))[^/]*",
    # Backups and locks of editors
    r"[^/]*~",
    r"~\$[^/]*",
    # Windows
    r"thumbs\.db(:encryptable)?",
    r"ehthumbs(_vista)?\.db",
    r"desktop\.ini",
    r"\$recycle\.bin",
    r"recycler",
    r"system volume information",
    # macOS and its file servers
    r"icon\r",
    r"__macosx",
    r"network trash folder",
    r"temporary items",
    r"thevolumesettingsfolder",
    # NAS boxes of Synology and QNAP
    r"@eadir",
    r"@tmp",
    r"@recycle",
    r"@recently-snapshot",
    r"#recycle",
    r"#snapshot",
    # Linux, Python, picture viewers
    r"lost\+found",
    r"__pycache__",
    r"picasa\.ini",
    # What tar and WebDataset store about files, where a reader does not know it
    r"paxheaders?(\.[0-9]+)?",
    r"gnusparsefile\.[0-9]+",
    r"__meta__\.json",
)
_FIRST = re.compile(rf"(?:\A|/)(?:{'|'.join(_LITTER)})(?=/|\Z)", re.IGNORECASE | re.DOTALL)


def litter_in(path: str) -> str | None:
    """Return a path up to its first part that is litter, or None if no part is."""
    match = _FIRST.search(path)
    return path[: match.end()] if match else None
