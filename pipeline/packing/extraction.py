"""Extract images from files that can only be read from front to end, so each can be read by its offset.

Shards take images in a shuffled order, and to reach one image of a compressed tar or of a Parquet file, all
before it must be decompressed. So the decompressed contents of each such file are written once to the folder
`.packing` of the output, where they stay until the dataset is complete:

    <digest>.contents       the decompressed tar, or the images of the Parquet file one after another
    <digest>.contents.npy   where each image of a Parquet file begins, and the last one ends
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from io import BytesIO

import numpy as np

from pipeline.files import atomic_write
from pipeline.packing.shard import ShardTask
from pipeline.packing.sources.compressed import CompressedFile
from pipeline.packing.sources.find import SourceImage
from pipeline.packing.sources.parquet import images_of, is_parquet
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.packing.workers import warn
from pipeline.remote_errors import redact

SUFFIX = ".contents"


def extract(tasks: Sequence[ShardTask], sequential: frozenset[str], output: Folder) -> list[ShardTask]:
    """Extract the sequential files among the sources, and return the tasks with sources in the copies.

    sequential: as in SplitFiles. Files that an earlier run extracted stay. Raises SourceError if a file is
    damaged, and OSError.
    """
    if not sequential:
        return list(tasks)
    files = sorted({source.file for task in tasks for source in task.sources} & sequential)
    present = output.sizes(STATE_FOLDER)
    missing = [file for file in files if f"{_name(file)}.npy" not in present]
    for number, file in enumerate(missing, 1):
        warn(f"extracting {redact(file)} ({number:,} of {len(missing):,})")
        _copy(file, output)
    names = {file: f"{STATE_FOLDER}/{_name(file)}" for file in files}
    edges = {file: np.load(BytesIO(output.read(f"{name}.npy"))) for file, name in names.items()}

    def moved(source: SourceImage) -> SourceImage:
        if source.file not in names:
            return source
        copy = f"{output.name}/{names[source.file]}"
        if source.size is not None:  # a member of a tar
            return replace(source, file=copy)
        start, end = edges[source.file][source.offset : source.offset + 2].tolist()
        return replace(source, file=copy, offset=start, size=end - start)

    return [replace(task, sources=tuple(map(moved, task.sources))) for task in tasks]


def _name(file: str) -> str:
    return f"{sha256(file.encode()).hexdigest()[:16]}{SUFFIX}"


def _copy(file: str, output: Folder) -> None:
    with output.staged(STATE_FOLDER) as folder:
        edges = [0]
        with atomic_write(folder / _name(file)) as copy:
            for part in _parts(file):
                edges.append(edges[-1] + copy.write(part))
        with atomic_write(folder / f"{_name(file)}.npy") as table:
            np.save(table, edges)


def _parts(file: str) -> Iterable[bytes]:
    if is_parquet(file):
        yield from images_of(file)
    else:
        with CompressedFile(file) as tar:
            yield from tar.chunks()
