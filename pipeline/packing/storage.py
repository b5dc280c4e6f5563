"""Read the packer's input and write its output, in folders of this machine or behind URLs.

Failed reads, and listings of this machine's file systems, are retried (pipeline/retry.py).
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.files import path_in_errors, sync_folder
from pipeline.locations import is_url
from pipeline.packing.workers import warn
from pipeline.remote_errors import as_os_error, redact
from pipeline.retry import StorageError, with_retries
from pipeline.storage import absolute, file_system, read_once

STATE_FOLDER = ".packing"  # subfolder of the output with the state of an unfinished run (resume.py)


def read(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read a file from `offset` on: all of it or `size` bytes. Raises OSError, which names the file."""
    return with_retries(partial(read_once, file, offset, size), warn)


class Folder:
    """The folder of a dataset, local or behind a URL. Each method raises OSError."""

    def __init__(self, name: str | Path):
        self.name = absolute(str(name)).rstrip("/")
        self.is_local = not is_url(self.name)
        with as_os_error(self.name):
            self.fs, self.path = file_system(self.name)

    def __str__(self) -> str:
        """Return the name for messages, without credentials."""
        return redact(self.name)

    @contextmanager
    def staged(self, subfolder: str = ".") -> Iterator[Path]:
        """Provide an empty local folder whose files are moved to this one, or a subfolder, after the block.

        Each file appears only once it is complete, and none appears after an error in the block. Each call
        makes a new folder, so two writers of the same file do not interfere.
        """
        scratch = Path(self.path, STATE_FOLDER) if self.is_local else None
        staging = Path(tempfile.mkdtemp(dir=scratch))
        try:
            yield staging
            target = os.path.normpath(f"{self.path}/{subfolder}")
            for file in sorted({file for file in staging.iterdir() if not file.name.startswith(".")}):
                if self.is_local:
                    file.replace(f"{target}/{file.name}")
                else:
                    self._put(file, f"{target}/{file.name}")
            if self.is_local:
                sync_folder(Path(target))
        finally:
            # NFS and FUSE keep files that are removed while open for a moment; the next run removes them.
            shutil.rmtree(staging, ignore_errors=True)

    def _put(self, file: Path, target: str) -> None:
        try:
            with as_os_error(self.name):
                self.fs.put_file(str(file), target)
        except FileNotFoundError as error:  # the bucket does not exist
            raise StorageError(f"{self}: {redact(str(error))}", "not found", transient=False) from None

    def read(self, name: str, size: int | None = None) -> bytes:
        """Read a file in the folder, or its first `size` bytes."""
        return read(f"{self.name}/{name}", 0, size)

    def sizes(self, subfolder: str = ".") -> dict[str, int]:
        """Return the sizes of all files in the folder, or in a subfolder, in bytes and by name."""
        folder = os.path.normpath(f"{self.path}/{subfolder}")
        if self.is_local:
            return with_retries(partial(_local_sizes, folder), warn)
        with as_os_error(str(self)):
            try:
                found = self.fs.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {Path(entry["name"]).name: entry["size"] for entry in found if entry["type"] == "file"}

    def remove(self, names: Iterable[str]) -> None:
        """Delete files. Local ones may be missing."""
        paths = [f"{self.path}/{name}" for name in names]
        if self.is_local:
            for path in paths:
                Path(path).unlink(missing_ok=True)
        elif paths:
            with as_os_error(str(self)):
                self.fs.rm(paths)


def _local_sizes(folder: str) -> dict[str, int]:
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return {}
    sizes = {}
    with path_in_errors(folder), entries:
        for entry in entries:
            try:
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # removed since the folder was listed
                continue
    return sizes
