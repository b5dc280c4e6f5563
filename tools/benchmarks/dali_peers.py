"""The same work done by DALI's own reader, with which `alexnet-train bench` compares."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline.checked import CheckedReader
from pipeline.graph import GraphOptions, augment, jpeg_batch
from pipeline.loader import Dataset
from pipeline.locations import inside
from pipeline.reader import ShardReader


def _reader(dataset: Dataset, mapped: bool = True) -> tuple[Any, Any]:
    shards = dataset.manifest.split("train").shards
    return webdataset_reader([str(inside(dataset.root, shard.file)) for shard in shards], mapped)


def webdataset_reader(tars: list[str], mapped: bool = True) -> tuple[Any, Any]:
    """Return JPEG bytes and label text from DALI's own WebDataset reader, shuffled in its buffer.

    mapped: map the files, as DALI does by default; nothing is then read until the bytes are used, and a
    truncated shard crashes the process.
    """
    indices = [Path(tar).with_suffix(".idx") for tar in tars]
    return fn.readers.webdataset(  # type: ignore[return-value]
        paths=tars,
        index_paths=[str(index) for index in indices] if all(map(Path.exists, indices)) else None,
        ext=["jpg", "cls"],
        dtypes=[types.UINT8, types.UINT8],
        dont_use_mmap=not mapped,
        random_shuffle=True,
        initial_fill=1024,
        name="reader",
    )


def dali_reader_bytes(dataset: Dataset, options: GraphOptions, mapped: bool) -> Callable[[], int]:
    """Read with DALI's reader, without decoding. Each call takes a batch and returns its number of images."""

    @pipeline_def
    def graph() -> tuple:
        jpeg, label = _reader(dataset, mapped)
        return jpeg, label

    return _batches(graph, options)


def external_source_bytes(
    reader: ShardReader, batches: Callable[[], Any], options: GraphOptions
) -> Callable[[], int]:
    """Read in the plan's order, with labels, without decoding. `batches()` returns sample indices."""
    checked = CheckedReader(reader, None, replace=False)
    kept: deque[tuple] = deque(maxlen=options.decoding.prefetch + 2)  # as the loader does

    def source() -> tuple:
        samples, files = checked.read(batches())
        kept.append((jpeg_batch(files.jpegs), reader.rows["label"][samples]))
        return kept[-1][:1]

    @pipeline_def
    def graph() -> Any:
        [jpeg] = fn.external_source(
            source=source, num_outputs=1, batch=True, no_copy=True, dtype=[types.UINT8], ndim=[1]
        )
        return jpeg

    return _batches(graph, options)


def dali_reader_images(dataset: Dataset, options: GraphOptions) -> Callable[[], int]:
    """Feed the training graph from DALI's reader, with DALI's random numbers, and pass batches to torch."""

    @pipeline_def
    def graph() -> tuple:
        jpeg, label = _reader(dataset)
        pixels = augment(
            jpeg,
            options,
            mean=types.Constant(list(dataset.manifest.pixels.mean), dtype=types.FLOAT),
            scale=1.0,
            x=fn.random.uniform(range=(0.0, 1.0)),
            y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
        )
        return pixels, fn.pad(label)  # label text, padded to equal length

    pipeline = _build(graph, options)

    def batch() -> int:
        pixels, text = pipeline.run()
        digits = text.as_array()
        labels = torch.from_numpy(digits.view(f"S{digits.shape[1]}")[:, 0].astype(np.int64))
        images = torch.from_dlpack(pixels.as_tensor()).movedim(-1, -3)
        return len(labels.to(images.device, non_blocking=True))

    return batch


def _build(graph: Callable, options: GraphOptions) -> Any:
    pipeline = graph(
        batch_size=options.batch,
        num_threads=options.decoding.threads,
        device_id=options.decoding.device_id,
        prefetch_queue_depth=options.decoding.prefetch,
    )
    pipeline.build()
    return pipeline


def _batches(graph: Callable, options: GraphOptions) -> Callable[[], int]:
    pipeline = _build(graph, options)
    return lambda: len(pipeline.run()[0])
