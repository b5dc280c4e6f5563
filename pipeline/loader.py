"""Loaders: what the plan says, through DALI, to torch tensors in channels_last without a copy.

A loader yields (pixels, labels) on its device: pixels [n,3,crop,crop], fp16
on a GPU and fp32 on a CPU, raw 0–255 minus the training mean; labels int64 [n]. DALI prepares the
batches ahead in its own threads, from the bytes as they were read from the shards.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checked import CheckedReader, LeaveOut
from pipeline.colour import colour_divisor, colour_offsets
from pipeline.graph import (
    CENTRE,
    GraphOptions,
    evaluation_pipeline,
    jpeg_batch,
    train_pipeline,
    undecodable,
)
from pipeline.manifest import RGB, DatasetError, Manifest, read_manifest
from pipeline.plan import Plan, crop_offsets, share
from pipeline.reader import Files, ShardReader

Batch = tuple[torch.Tensor, torch.Tensor]
LOOK_AHEAD = 1024  # samples that are fetched from the disk before DALI asks for them
Request = tuple[np.ndarray, tuple[np.ndarray, ...]]  # sample numbers, and arrays with a row for each


class Dataset:
    """An opened dataset: its manifest and a reader for each split that is asked for.

    mean: RGB [3], of the net that is to see it, in the place of the dataset's own. processes: that have it
    open on this machine. Raises DatasetError, as `read_manifest` and `ShardReader` do.
    """

    def __init__(self, root: Path, mean: RGB | None = None, processes: int = 1):
        self.root, self.processes = root, processes
        self.manifest: Manifest = read_manifest(root)
        if mean is not None:
            pixels = self.manifest.pixels.model_copy(update={"mean": mean})
            self.manifest = self.manifest.model_copy(update={"pixels": pixels})
        self._readers: dict[str, ShardReader] = {}

    def reader(self, split: str) -> ShardReader:
        if split not in self._readers:
            self._readers[split] = ShardReader(self.root, self.manifest, split, self.processes)
        return self._readers[split]


@dataclass(frozen=True)
class Decoding:
    """Where and how images are decoded. crop: side in pixels. threads: of DALI. prefetch: batches.
    hw_decoder_load: the share of the images that a GPU's JPEG engine decodes, where it has one. cores: for
    each thread the one that it is kept on, or none, and the system moves them."""

    crop: int = 224
    device: torch.device = field(default=torch.device("cpu"))
    threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65  # DALI's own default
    cores: tuple[int, ...] = ()


def train_loader(
    dataset: Dataset,
    plan: Plan,
    steps: range,
    decoding: Decoding,
    *,
    crops_and_flips: bool = True,
    colour: str = "off",
    colour_epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
    leave_out: LeaveOut | None = None,
) -> Iterator[Batch]:
    """A rank's part of each step: random crop, mirror and colour.

    crops_and_flips: without, each image is its centre, as in evaluation. colour: one of COLOURS.
    colour_epochs: epochs after which it is switched off, if it is. leave_out: told of each damaged
    sample, for which the next one of the dataset is taken, with the draws that were for it; None makes
    it a DatasetError.
    Raises ValueError if `world` does not divide the plan's batch, DatasetError for damaged data.
    """
    reader, pixels = dataset.reader("train"), dataset.manifest.pixels
    mean = np.array(pixels.mean)

    def requests() -> Iterator[Request]:
        for step in steps:
            batch = plan.step_batch(step, rank, world)
            if crops_and_flips:
                rows, mirror = reader.rows[batch.samples], batch.draws.mirror
                x, y = _crop_places(dataset.manifest, rows, batch.draws.uniform, decoding.crop)
            else:
                x, y = np.full((2, len(batch.samples)), CENTRE[0])
                mirror = np.zeros(len(batch.samples))
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
                    mirror.astype(np.int32),
                ),
            )

    plan.step_batch(0, rank, world)  # so that a batch that cannot be divided is refused here
    options = graph_options(dataset.manifest, decoding, plan.batch // world)
    checked = CheckedReader(reader, leave_out, replace=True)
    return iter(_Stream(train_pipeline, options, checked, requests, decoding.device))


def evaluation_loader(
    dataset: Dataset,
    split: str,
    batch: int,
    decoding: Decoding,
    *,
    crops: int = 1,
    rank: int = 0,
    world: int = 1,
    leave_out: LeaveOut | None = None,
    kept: bool = False,
) -> Iterable[Batch]:
    """A rank's share of a split, in order, each sample once; the last batch may be smaller.

    crops: 1 for the centre or 10; with ten, pixels are [n,10,3,crop,crop]. leave_out: told of each
    damaged sample, which is missing; None makes it a DatasetError. kept: between one iteration and the
    next, with the memory and the threads that decode; others are made and ended with each.
    """
    reader = dataset.reader(split)
    mine = share(len(reader), rank, world)

    def requests() -> Iterator[Request]:
        for start in range(mine.start, mine.stop, batch):
            yield np.arange(start, min(start + batch, mine.stop)), ()

    build = partial(evaluation_pipeline, mean=dataset.manifest.pixels.mean, crops=crops)
    options = graph_options(dataset.manifest, decoding, batch)
    checked = CheckedReader(reader, leave_out, replace=False)
    return _Stream(build, options, checked, requests, decoding.device, kept)


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
        hw_decoder_load=decoding.hw_decoder_load,
        cores=decoding.cores,
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


class _Stream:
    """Feeds requests to a DALI pipeline, which build(source, options) makes, and yields what comes out.

    requests() are those of an iteration. kept: the pipeline, after it.
    """

    def __init__(
        self,
        build: Callable[[Callable, GraphOptions], Any],
        options: GraphOptions,
        checked: CheckedReader,
        requests: Callable[[], Iterator[Request]],
        device: torch.device,
        kept: bool = False,
    ):
        self.build, self.options, self.device, self.kept = build, options, device, kept
        self.checked, self.reader = checked, checked.reader
        self.all_requests = requests
        self.failure: DatasetError | None = None
        self.under_way: deque[tuple[Request, Files]] = deque()  # which DALI has and has not answered
        # DALI reads the arrays where they are, on a GPU also after it has answered.
        self.inputs: deque[tuple] = deque(maxlen=options.prefetch + 2)
        self.pipeline = build(self._source, options)

    def __iter__(self) -> Iterator[Batch]:
        device = self.device
        self.requests, self.failure = self._fetched_ahead(self.all_requests()), None
        self.under_way.clear()
        self.checked.bad[:] = False  # what was out of reach may be there again
        # Not in self while it runs: it refers to that, and only the garbage collector would end its threads.
        pipeline, self.pipeline = self.pipeline or self.build(self._source, self.options), None
        while True:
            # On a GPU the outputs are ready in the order of torch's stream: the host does not wait.
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            try:
                [pixels] = pipeline.run(stream)
            except StopIteration:
                if self.failure is not None:
                    raise self.failure from None
                if self.kept:
                    pipeline.reset()
                    self.pipeline = pipeline
                return
            except RuntimeError as error:
                self._leave_out_undecodable(error)
                self.requests = chain([request for request, _ in self.under_way], self.requests)
                self.under_way.clear()
                pipeline = self.build(self._source, self.options)
                continue
            (samples, _), _ = self.under_way.popleft()
            labels = torch.from_numpy(self.reader.rows["label"][samples].astype(np.int64))
            # HWC in memory and CHW in shape is what torch calls channels_last.
            yield torch.from_dlpack(pixels.as_tensor()).movedim(-1, -3), labels.to(device, non_blocking=True)

    def _fetched_ahead(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The requests, while what the next ones need comes from the disk: many reads at a time, where
        reading them would wait for one after the other."""
        waiting: deque[Request] = deque()
        samples, once = 0, self.reader.stays_in_memory
        for request in requests:
            numbers = request[0]
            self.reader.will_need(self.checked.unread(numbers) if once else numbers)
            waiting.append(request)
            samples += len(numbers)
            while samples - len(waiting[0][0]) >= LOOK_AHEAD:
                samples -= len(waiting[0][0])
                yield waiting.popleft()
        yield from waiting

    def _source(self) -> tuple:
        """What DALI shall work on next."""
        samples = np.array([], np.int64)
        while not samples.size:
            wanted, arguments = next(self.requests)
            try:
                samples, files = self.checked.read(wanted)
            except DatasetError as error:
                self.failure = error  # for when the batches before it are through
                raise StopIteration from None
        self.under_way.append(((samples, arguments), files))
        self.inputs.append((jpeg_batch(files.jpegs), *arguments))
        return self.inputs[-1]

    def _leave_out_undecodable(self, error: RuntimeError) -> None:
        """DALI does not say which sample it could not decode: try all that it had, one by one."""
        had = [
            (number, jpeg)
            for (samples, _), files in self.under_way
            for number, jpeg in zip(samples.tolist(), files.jpegs, strict=True)
        ]
        places = undecodable([jpeg for _, jpeg in had], self.options)
        if not places:
            raise DatasetError(f"DALI cannot decode a batch: {error}") from error
        for place in places:
            self.checked.note_undecodable(had[place][0])
