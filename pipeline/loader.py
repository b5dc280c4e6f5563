"""Loaders: what the plan says, through DALI, to torch tensors in channels_last without a copy.

A loader is iterated once and yields (pixels, labels) on its device: pixels [n,3,crop,crop], fp16
on a GPU and fp32 on a CPU, raw 0–255 minus the training mean; labels int64 [n]. DALI prepares the
batches ahead in its own threads, and reads the JPEG bytes straight from the mapped shards.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.colour import colour_divisor, colour_offsets
from pipeline.graph import GraphOptions, evaluation_pipeline, train_pipeline
from pipeline.manifest import DatasetError, Manifest, read_manifest
from pipeline.plan import Plan, crop_offsets, share
from pipeline.shards import ShardReader

Batch = tuple[torch.Tensor, torch.Tensor]
_SOI = b"\xff\xd8"  # with which each JPEG begins
Request = tuple[np.ndarray, tuple[np.ndarray, ...]]  # sample numbers, and arrays with a row for each


class Dataset:
    """An opened dataset: its manifest and a reader for each split that is asked for.

    Raises DatasetError, as `read_manifest` and `ShardReader` do.
    """

    def __init__(self, root: Path):
        self.root = root
        self.manifest: Manifest = read_manifest(root)
        self._readers: dict[str, ShardReader] = {}

    def reader(self, split: str) -> ShardReader:
        if split not in self._readers:
            self._readers[split] = ShardReader(self.root, self.manifest, split)
        return self._readers[split]


@dataclass(frozen=True)
class Decoding:
    """Where and how images are decoded. crop: side in pixels. threads: of DALI. prefetch: batches."""

    crop: int = 224
    device: torch.device = field(default=torch.device("cpu"))
    threads: int = 2
    prefetch: int = 2


def train_loader(
    dataset: Dataset,
    plan: Plan,
    steps: range,
    decoding: Decoding,
    *,
    colour: str = "off",
    colour_epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """A rank's part of each step: random crop, mirror and colour.

    colour: one of COLOURS. colour_epochs: epochs after which it is switched off, if it is.
    Raises ValueError if `world` does not divide the plan's batch, DatasetError for damaged data.
    """
    reader, pixels = dataset.reader("train"), dataset.manifest.pixels
    mean = np.array(pixels.mean)

    def requests() -> Iterator[Request]:
        for step in steps:
            batch = plan.step_batch(step, rank, world)
            x, y = _crop_places(
                dataset.manifest, reader.rows[batch.samples], batch.draws.uniform, decoding.crop
            )
            coloured = batch.epoch < (np.inf if colour_epochs is None else colour_epochs)
            offsets = np.where(coloured[:, None], colour_offsets(colour, pixels, batch.draws.normal), 0.0)
            divisor = np.where(coloured, colour_divisor(colour), 1.0)
            yield (
                batch.samples,
                (
                    (mean - offsets).astype(np.float32),
                    divisor.astype(np.float32),
                    x.astype(np.float32),
                    y.astype(np.float32),
                    batch.draws.mirror.astype(np.int32),
                ),
            )

    def build(source: Callable) -> Any:
        return train_pipeline(source, graph_options(dataset.manifest, decoding, plan.batch // world))

    plan.step_batch(0, rank, world)  # so that a batch that cannot be divided is refused here
    return _run(build, reader, requests(), decoding)


def evaluation_loader(
    dataset: Dataset,
    split: str,
    batch: int,
    decoding: Decoding,
    *,
    crops: int = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """A rank's share of a split, in order, each sample once; the last batch may be smaller.

    crops: 1 for the centre or 10; with ten, pixels are [n,10,3,crop,crop].
    """
    reader = dataset.reader(split)
    mine = share(len(reader), rank, world)

    def requests() -> Iterator[Request]:
        for start in range(mine.start, mine.stop, batch):
            yield np.arange(start, min(start + batch, mine.stop)), ()

    def build(source: Callable) -> Any:
        options = graph_options(dataset.manifest, decoding, batch)
        return evaluation_pipeline(source, options, dataset.manifest.pixels.mean, crops)

    return _run(build, reader, requests(), decoding) if mine else iter(())


def synthetic_loader(batch: int, classes: int, decoding: Decoding) -> Iterator[Batch]:
    """The same random batch for ever: what a model does when its input costs nothing."""
    generator = torch.Generator().manual_seed(0)
    side = decoding.crop
    pixels = torch.randint(-128, 128, (batch, side, side, 3), generator=generator).permute(0, 3, 1, 2)
    dtype = torch.float16 if decoding.device.type == "cuda" else torch.float32
    pixels = pixels.to(decoding.device, dtype)
    labels = torch.randint(classes, (batch,), generator=generator).to(decoding.device)
    while True:
        yield pixels, labels


def graph_options(manifest: Manifest, decoding: Decoding, batch: int) -> GraphOptions:
    """The graph for a dataset. Raises DatasetError if the crop is larger than its images."""
    if decoding.crop > manifest.size:
        raise DatasetError(
            f"a crop of {decoding.crop} px does not fit into images of {manifest.size} px: "
            f"set --crop to at most {manifest.size}, or pack larger images"
        )
    return GraphOptions(
        batch=batch,
        crop=decoding.crop,
        resize_shorter=manifest.size if manifest.geometry == "original" else None,
        max_width=manifest.max_width,
        max_height=manifest.max_height,
        device_id=decoding.device.index or 0 if decoding.device.type == "cuda" else None,
        threads=decoding.threads,
        prefetch=decoding.prefetch,
    )


def _crop_places(
    manifest: Manifest, rows: np.ndarray, uniform: np.ndarray, crop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Crop positions as DALI wants them, 0 to 1 over the room, at whole pixels."""
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    shorter = np.minimum(width, height)
    places = []
    for axis, stored in enumerate((width, height)):
        extent = np.floor(stored * manifest.size / shorter + 0.5).astype(np.int64)  # as DALI rounds
        places.append(crop_offsets(uniform[:, axis], extent, crop) / np.maximum(extent - crop, 1))
    return places[0], places[1]


def _run(
    build: Callable[[Callable], Any], reader: ShardReader, requests: Iterable[Request], decoding: Decoding
) -> Iterator[Batch]:
    """Feed the requests to a pipeline and yield what comes out."""
    # DALI reads the arrays where they are, so those of every batch under way are kept.
    under_way: deque = deque(maxlen=decoding.prefetch + 2)
    queue = iter(requests)
    overwritten: list[int] = []

    def source() -> tuple:
        samples, arguments = next(queue)
        jpegs = reader.jpegs(samples)
        inputs = (jpegs, reader.rows["label"][samples].astype(np.int64), *arguments)
        # On bytes that do not begin like a JPEG, DALI may crash the process instead of raising.
        overwritten.extend(n for n, jpeg in zip(samples, jpegs, strict=True) if jpeg[:2].tobytes() != _SOI)
        if overwritten:
            raise StopIteration  # once the batches before it are through
        under_way.append((samples, inputs))
        return inputs

    pipeline = build(source)

    def batches() -> Iterator[Batch]:
        while True:
            # On a GPU the outputs are ready in the order of torch's stream: the host does not wait.
            stream = torch.cuda.current_stream(decoding.device) if decoding.device.type == "cuda" else None
            try:
                pixels, labels = pipeline.run(stream)
            except StopIteration:
                if overwritten:
                    raise _undecodable(reader, overwritten[0]) from None
                return
            except RuntimeError as error:
                raise _explained(error, reader, under_way) from error
            # HWC in memory and CHW in shape is what torch calls channels_last.
            yield torch.from_dlpack(pixels.as_tensor()).movedim(-1, -3), torch.from_dlpack(labels.as_tensor())

    return batches()


def _explained(error: RuntimeError, reader: ShardReader, under_way: Iterable) -> DatasetError:
    """DALI does not say which sample it could not decode: find it among those under way."""
    from PIL import Image

    for samples, (jpegs, *_) in under_way:
        for sample, jpeg in zip(samples, jpegs, strict=True):
            try:
                with Image.open(BytesIO(jpeg.tobytes())) as image:
                    image.load()
            except Exception:  # whatever a damaged file makes Pillow raise
                return _undecodable(reader, sample)
    return DatasetError(f"DALI cannot decode a batch: {error}")


def _undecodable(reader: ShardReader, sample: int) -> DatasetError:
    return DatasetError(f"the sample in {reader.name(sample)} cannot be decoded: copy the shard again")
