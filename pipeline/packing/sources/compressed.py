"""Read compressed files, which can only be read from front to end."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

from pipeline.packing.sources.listing import SourceError
from pipeline.retry import is_of_storage
from pipeline.storage import open_file

SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20  # bytes


def is_compressed(head: bytes, file: str) -> bool:
    """Return whether a file is compressed, by its first bytes. Raises SourceError for Zstandard."""
    if head.startswith(_ZSTD):
        raise SourceError(f"{file} is compressed by Zstandard: decompress it with unzstd first")
    return head.startswith(tuple(_OPENERS))


class CompressedFile:
    """A compressed file that is read like storage.read reads a plain one. Use it in a `with` block.

    Offsets are those of the decompressed bytes, and should not decrease: going back starts from the front.
    """

    def __init__(self, file: str):
        self.file = file
        self._raw = open_file(file)
        head = self._raw.read(8)
        self._raw.seek(0)
        opener = next(opener for magic, opener in _OPENERS.items() if head.startswith(magic))
        self._stream: IO[bytes] = opener(self._raw)

    def __enter__(self) -> "CompressedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def __call__(self, file: str, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes. Raises SourceError if the file is damaged or ends before."""
        with self._naming_damage():
            self._stream.seek(offset)
            content = self._stream.read(size)
        if len(content) < size:
            raise SourceError(f"{file} is truncated: the tar does not end properly at byte {offset}")
        return content

    def chunks(self) -> Iterator[bytes]:
        """Yield all decompressed bytes. Raises SourceError if the file is damaged."""
        with self._naming_damage():
            self._stream.seek(0)
            while chunk := self._stream.read(_CHUNK):
                yield chunk

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if is_of_storage(error):
                raise
            raise SourceError(f"{self.file} is truncated or damaged: {error}") from None
