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
    r"(?i:(eh)?thumbs(_vista)?\.db)(:encryptable)?",
    r"(?i:desktop\.ini)",
    r"(?i:\$recycle\.bin)",
    r"RECYCLER",
    r"System Volume Information",
    # macOS, whose SMB writes the line end of Icon as U+F00D, and file servers for it
    r"Icon[\r\uf00d]",
    r"__MACOSX",
    r"Network Trash Folder",
    r"Temporary Items",
    r"TheVolumeSettingsFolder",
    # NAS boxes of Synology and QNAP
    r"@eaDir",
    r"@tmp",
    r"@Recycle",
    r"@Recently-Snapshot",
    r"#recycle",
    r"#snapshot",
    # Linux, Python and picture viewers
    r"lost\+found",
    r"__pycache__",
    r"(?i:picasa\.ini)",
    # What tar and WebDataset store about files
    r"PaxHeaders?(\.[0-9]+)?",
    r"GNUSparseFile\.[0-9]+",
    r"__meta__\.json",
)
_FIRST = re.compile(rf"(?:\A|/)(?:{'|'.join(_LITTER)})(?=/|\Z)", re.DOTALL)


def litter_in(path: str) -> str | None:
    """Return a path up to its first part that is litter, or None if no part is."""
    match = _FIRST.search(path)
    return path[: match.end()] if match else None
