"""Load batches of images by DALI as channels_last torch tensors, for training and for evaluation.

A loader yields (pixels, labels) on its device. pixels: [n,3,crop,crop], by default fp16 on a GPU and fp32 on
a CPU, on the 0–255 scale minus the training mean. labels: int64 [n]. The main thread reads the files from the
shards, and DALI decodes them ahead in its own threads and hands over its outputs without a copy. For fp32 on
a CPU, DALI's part ends with decoding, and cpu_crop.py makes the pixels of a batch when it is taken.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, tee

import numpy as np
import torch

from pipeline.checked import CheckedReader, OnDamage
from pipeline.colour import colour_divisor, colour_offsets
from pipeline.dataset import Dataset
from pipeline.graph import (
    CENTRE,
    Decoding,
    GraphOptions,
    evaluation_pipeline,
    train_pipeline,
)
from pipeline.manifest import RGB, DatasetError, Manifest
from pipeline.plan import Plan, RankBatch, crop_offsets, share
from pipeline.resized_crop import resized_crops
from pipeline.stream import Batch, Request, Stream, in_turn

BLOCK_IMAGES = 2048  # images for which random numbers are drawn at a time


def train_loader(
    dataset: Dataset,
    plan: Plan,
    steps: range,
    decoding: Decoding,
    *,
    split: str = "train",
    mean: RGB | None = None,
    std: RGB = (1.0, 1.0, 1.0),
    crops_and_flips: bool = True,
    scale: tuple[float, float] | None = None,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    colour: str = "off",
    colour_epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
    on_damage: OnDamage | None = None,
) -> Iterator[Batch]:
    """Load a rank's share of each step, with random crop, mirror and colour.

    mean, std: RGB [3] on the 0–255 scale, subtracted from the pixels, and their divisor after it; the default
    mean is that of the dataset. crops_and_flips: if false, each image is its centre crop, as in evaluation.
    scale, ratio: if `scale` is given, crops are random resized crops (see `resized_crops`). colour: one of
    COLOURS. colour_epochs: number of epochs after which the colour noise is switched off, or None for never.
    rank, world: the index of this process, and the number of processes. on_damage: called with each damaged
    sample, whose place the next sample of the dataset takes, with the same random draws; if None, damage
    raises DatasetError. Raises ValueError if `world` does not divide the plan's batch, DatasetError if the
    crop is too large, and OutageError if the storage fails.
    """
    reader, pixels = dataset.reader(split), dataset.manifest.pixels
    subtracted = np.array(pixels.mean if mean is None else mean)

    def places(step: int, steps: int, batch: RankBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of the graph that place the crops."""
        rows = reader.rows[batch.samples]
        if not crops_and_flips:
            x, y = np.full((2, len(rows)), CENTRE[0])
            return x, y
        if scale is None:
            return _crop_positions(dataset.manifest, rows, batch.draws.uniform, decoding.crop)
        drawn = plan.step_resizes(step, rank, world, steps)
        boxes = resized_crops(drawn, rows["width"], rows["height"], scale, ratio)
        parts = boxes / np.stack((rows["width"], rows["height"]) * 2, 1)
        return parts[:, 1::-1], parts[:, :1:-1]

    def requests() -> Iterator[Request]:
        epoch = steps.start * plan.batch // plan.samples
        for first in range(steps.start, steps.stop, steps_per_block):  # a draw for many steps costs less
            block = min(steps_per_block, steps.stop - first)
            batch = plan.step_batch(first, rank, world, block)
            if batch.epoch[-1] > epoch:
                epoch = batch.epoch[-1]
                checked.begin_epoch()
            coloured = (batch.epoch < (np.inf if colour_epochs is None else colour_epochs))[:, None]
            offsets = np.where(coloured, colour_offsets(colour, pixels, batch.draws.normal), 0.0)
            arguments = (
                (subtracted - offsets).astype(np.float32),
                (np.where(coloured, colour_divisor(colour), 1.0) * std).astype(np.float32),
                (batch.draws.mirror & crops_and_flips).astype(np.int32),
                *(place.astype(np.float32) for place in places(first, block, batch)),
            )
            for number in range(block):
                reader.advance(max(first + number - steps_behind, steps.start))
                step = slice(number * images, (number + 1) * images)
                given = tuple(argument[step] for argument in arguments)
                yield Request(batch.samples[step], given[later:], given[:later])

    images = plan.images_per_rank(world)
    steps_per_block = max(1, BLOCK_IMAGES // images)
    resized = crops_and_flips and scale is not None
    options = graph_options(dataset.manifest, decoding, images, resized)
    checked = CheckedReader(reader, on_damage, replace=True)
    make_cropper = _find_cropper(decoding)
    later = 0 if make_cropper is None else 3 if resized else 5  # arguments that the cropper takes
    build = partial(train_pipeline, resized=resized, only_decode=make_cropper is not None)
    count = decoding.pipelines
    # Each pipeline makes requests before it reads their samples.
    steps_behind = count * (Stream.look_ahead // images + 1)
    reader.follow(plan, steps.start, rank, world)
    return in_turn(
        [
            Stream(
                build,
                options,
                checked,
                partial(islice, copy, first, None, count),
                decoding.device,
                make_cropper=make_cropper,
            )
            for first, copy in enumerate(tee(requests(), count))
        ]
    )


def evaluation_loader(
    dataset: Dataset,
    split: str,
    batch: int,
    decoding: Decoding,
    *,
    crops: int = 1,
    mean: RGB | None = None,
    std: RGB = (1.0, 1.0, 1.0),
    rank: int = 0,
    world: int = 1,
    on_damage: OnDamage | None = None,
    persistent: bool = False,
) -> Stream:
    """Load a rank's share of a split in order, each sample once; the last batch may be smaller.

    batch: number of images per rank. crops: 1 (the centre) or 10, for which pixels are [n,10,3,crop,crop].
    mean, std: as for `train_loader`. on_damage: called with each damaged sample, which is then missing; if
    None, damage raises DatasetError. persistent: keep DALI's memory and threads between iterations, instead
    of creating them for each. Raises DatasetError if the crop is too large, and OutageError if the storage
    fails.
    """
    reader = dataset.reader(split)
    mine = share(len(reader), rank, world)

    def requests() -> Iterator[Request]:
        checked.begin_epoch()
        behind = batch * (Stream.look_ahead // batch + 1)  # requests are made before their samples are read
        for start in range(mine.start, mine.stop, batch):
            reader.read_in_order(range(max(start - behind, mine.start), mine.stop))
            yield Request(np.arange(start, min(start + batch, mine.stop)))
        reader.read_in_order(None)

    subtracted = dataset.manifest.pixels.mean if mean is None else mean
    build = partial(evaluation_pipeline, mean=subtracted, std=std, crops=crops)
    options = graph_options(dataset.manifest, decoding, batch)
    checked = CheckedReader(reader, on_damage, replace=False)
    return Stream(build, options, checked, requests, decoding.device, persistent)


def synthetic_loader(batch: int, classes: int, decoding: Decoding) -> Iterator[Batch]:
    """Yield the same random batch forever, to measure a model without the cost of its input."""
    generator = torch.Generator().manual_seed(0)
    side = decoding.crop
    pixels = torch.randint(-128, 128, (batch, side, side, 3), generator=generator).permute(0, 3, 1, 2)
    pixels = pixels.to(decoding.device, decoding.output)
    labels = torch.randint(classes, (batch,), generator=generator).to(decoding.device)
    while True:
        yield pixels, labels


def graph_options(manifest: Manifest, decoding: Decoding, batch: int, resized: bool = False) -> GraphOptions:
    """Return a graph's options for a dataset.

    resized: whether crops are resized, and so may be of any size. Otherwise, raises DatasetError if the crop
    is larger than the dataset's images.
    """
    if decoding.crop > manifest.size and not resized:
        raise DatasetError(
            f"a crop of {decoding.crop} px does not fit into images of {manifest.size} px: "
            f"set the crop to {manifest.size} px or less, or pack larger images"
        )
    return GraphOptions(
        decoding=decoding,
        batch=batch,
        resize_shorter=manifest.size if manifest.geometry == "original" else None,
        max_width=manifest.max_width,
        max_height=manifest.max_height,
    )


def _crop_positions(
    manifest: Manifest, rows: np.ndarray, uniform: np.ndarray, crop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the crops' x and y as DALI expects them: 0 to 1 over the range of offsets, at whole pixels.

    uniform: [n,2], draws in [0, 1) for x and y. crop: side in pixels.
    """
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    shorter = np.minimum(width, height)
    positions = []
    for axis, stored in enumerate((width, height)):
        extent = np.floor(stored * manifest.size / shorter + 0.5).astype(np.int64)  # as DALI rounds
        positions.append(crop_offsets(uniform[:, axis], extent, crop) / np.maximum(extent - crop, 1))
    return positions[0], positions[1]


def _find_cropper(decoding: Decoding) -> Callable[[], Callable[..., torch.Tensor]] | None:
    """Return what makes a `Cropper`, or None if the graph should crop and normalise."""
    if decoding.device_id is not None or decoding.output != torch.float32:
        return None
    try:
        from pipeline.cpu_crop import Cropper
    except OSError as error:
        warnings.warn(f"no compiled CPU kernel, so images load more slowly: {error}", stacklevel=2)
        return None
    return partial(Cropper, decoding.crop, decoding.threads)
