"""The DALI graphs, training and evaluation side by side; the only importer of DALI.

One graph serves both backends: on a GPU the decoder is `mixed` and all else runs there; without
one (`device_id=None`) the same operators run on the CPU. Every random number comes in from the
plan, so nothing in here is random.

Inputs of a training sample, from `fn.external_source`:

    jpeg    uint8 [bytes]   the file
    mean    float [3]       subtracted; the colour offset of fancy PCA is already taken off it
    scale   float []        divides after that
    x, y    float []        place of the crop, 0 to 1 over the room that there is
    mirror  int32 []        1 to flip left to right

Output: pixels [crop,crop,3] (HWC). Ten crops stack theirs as [10,crop,crop,3].
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU

CENTRE = (0.5, 0.5)
TEN_CROP_PLACES = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), CENTRE)  # and each one's mirror image
RESERVED_BYTES = 2**31  # of a GPU, at most, for the images of a batch before any has come

# DALI keeps what it allocates above this, as it does above 32 MB by default: smaller batches would go
# back to the system and come page by page again each time. It is read at the first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")


@dataclass(frozen=True)
class GraphOptions:
    """What a graph is built for.

    crop: side in pixels. resize_shorter: to which the shorter side is brought first, or None for
    shards that hold images of that size. max_width, max_height: of the dataset, in pixels. device_id:
    the GPU, or None for the CPU. batch: images at most. hw_decoder_load: the share of them for the
    GPU's JPEG engine. cores: for each thread the one that it is kept on, or none.
    """

    batch: int
    crop: int
    resize_shorter: int | None
    max_width: int
    max_height: int
    device_id: int | None = None
    threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    cores: tuple[int, ...] = ()


def jpeg_batch(jpegs: Iterable[memoryview]) -> TensorListCPU:
    """Files as one batch for a source to return, where they are; it keeps their memory. DALI would make
    the same of a list of arrays, after looking at each in Python, which costs three times as much."""
    return TensorListCPU([TensorCPU(jpeg) for jpeg in jpegs], contiguous=False)  # type: ignore[call-overload]


def reserved_size(options: GraphOptions) -> tuple[int, int]:
    """Width and height of the images that the decoder reserves memory for: the dataset's largest, but less
    of both where a batch of such would take more than RESERVED_BYTES. Those that are larger get theirs later.
    """
    batch_bytes = options.batch * options.max_width * options.max_height * 3
    scale = min(1.0, math.sqrt(RESERVED_BYTES / batch_bytes))
    return max(1, int(options.max_width * scale)), max(1, int(options.max_height * scale))


def _decode(jpeg: Any, options: GraphOptions) -> Any:
    """JPEG bytes to RGB [h,w,3], with its shorter side as the options say."""
    on_gpu = options.device_id is not None
    width, height = reserved_size(options)
    images = fn.decoders.image(
        jpeg,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,  # the packer turned what was rotated; DALI reads broken EXIF otherwise
        affine=False,  # or the threads of all processes on a machine would share its first cores
        preallocate_width_hint=width if on_gpu else None,
        preallocate_height_hint=height if on_gpu else None,
        hw_decoder_load=options.hw_decoder_load if on_gpu else None,
    )
    if options.resize_shorter is not None:
        images = fn.resize(
            images,
            resize_shorter=options.resize_shorter,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            subpixel_scale=False,  # as Pillow, whose resizing made the other geometries
        )
    return images


def _crop(images: Any, options: GraphOptions, **arguments: Any) -> Any:
    """Crop, mirror, subtract, divide and convert in one operator; fp16 is for the GPU: on a CPU
    converting to it costs more than all the rest."""
    return fn.crop_mirror_normalize(
        images,
        crop=(options.crop, options.crop),
        dtype=types.FLOAT if options.device_id is None else types.FLOAT16,
        output_layout="HWC",
        **arguments,
    )


def augment(jpeg: Any, options: GraphOptions, *, mean: Any, scale: Any, x: Any, y: Any, mirror: Any) -> Any:
    """A training image from its file: the operators between the inputs above and the pixels."""
    images = _decode(jpeg, options)
    return _crop(images, options, crop_pos_x=x, crop_pos_y=y, mirror=mirror, mean=mean, std=scale)


def _train(source: Callable, options: GraphOptions) -> Any:
    jpeg, mean, scale, x, y, mirror = fn.external_source(
        source=source,
        num_outputs=6,
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
        ndim=[1, 1, 0, 0, 0, 0],
    )
    return augment(jpeg, options, mean=mean, scale=scale, x=x, y=y, mirror=mirror)


def _evaluate(source: Callable, options: GraphOptions, mean: Sequence[float], ten: bool) -> Any:
    [jpeg] = fn.external_source(
        source=source, num_outputs=1, batch=True, no_copy=True, dtype=[types.UINT8], ndim=[1]
    )
    images = _decode(jpeg, options)
    places = [(x, y, mirror) for mirror in (0, 1) for x, y in TEN_CROP_PLACES] if ten else [(*CENTRE, 0)]
    crops = [
        _crop(images, options, crop_pos_x=x, crop_pos_y=y, mirror=mirror, mean=list(mean))
        for x, y, mirror in places
    ]
    return fn.stack(*crops) if ten else crops[0]


def _build(graph: Callable, options: GraphOptions, *arguments: Any) -> Any:
    if options.cores:
        os.environ["DALI_AFFINITY_MASK"] = ",".join(map(str, options.cores))  # read as the threads start
    pipeline = pipeline_def(graph)(
        *arguments,
        batch_size=options.batch,
        num_threads=options.threads,
        device_id=options.device_id,
        prefetch_queue_depth=options.prefetch,
        set_affinity=bool(options.cores),
    )
    pipeline.build()
    return pipeline


def undecodable(jpegs: Sequence[memoryview], options: GraphOptions) -> list[int]:
    """The places of those files that the decoder does not take: of a batch it does not say which."""
    found: list[int] = []
    done = 0

    def graph() -> Any:
        rest = ([np.asarray(jpeg)] for jpeg in jpegs[done:])
        return _decode(fn.external_source(source=rest, batch=True, dtype=types.UINT8, ndim=1), options)

    while done < len(jpegs):
        pipeline = _build(graph, replace(options, batch=1, prefetch=1))  # one that failed is of no more use
        try:
            while done < len(jpegs):
                pipeline.run()
                done += 1
        except RuntimeError:
            found.append(done)
            done += 1
    return found


def train_pipeline(source: Callable, options: GraphOptions) -> Any:
    """Random crop, mirror and colour. source() returns the six inputs of a batch, each a list
    or an array with a row a sample, or raises StopIteration."""
    return _build(_train, options, source, options)


def evaluation_pipeline(source: Callable, options: GraphOptions, mean: Sequence[float], crops: int) -> Any:
    """The centre crop (crops=1), or corners and centre with their mirror images (crops=10,
    section 4.1). source() returns a tuple of jpeg alone. mean: RGB [3], subtracted."""
    if crops not in (1, 10):
        raise ValueError(f"{crops} crops are not possible: 1 (centre) or 10 (corners, centre, mirrored)")
    return _build(_evaluate, options, source, options, mean, crops == 10)
