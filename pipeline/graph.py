"""The DALI graphs for training and evaluation; this is the only module that imports DALI.

One graph serves both backends: on a GPU the decoder is `mixed` and the other operators run on the GPU; on a
CPU the same operators run there. All random numbers come from the plan, so nothing here is random.

Inputs of a training sample, from `fn.external_source`:

    jpeg    uint8 [bytes]   the file
    mean    float [3]       the mean minus the image's colour offset (fancy PCA), subtracted from the pixels
    scale   float [3]       the divisor of the pixels after the subtraction
    mirror  int32 []        1 to flip the image left to right, else 0
    x, y    float []        the position of the crop, 0 to 1 over the range of possible offsets

For random resized crops, there are instead of x and y:

    anchor  float [2]       the top and the left edge of the part of the image, 0 to 1
    shape   float [2]       the height and the width of the part, 0 to 1

The output of a sample is its pixels [crop,crop,3] (HWC), or [10,crop,crop,3] for ten crops. A pipeline that
only decodes, for cpu_crop.py, has neither mean, scale and mirror nor x and y, and gives uint8 [h,w,3].
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from PIL import Image

CENTRE = (0.5, 0.5)
# Each is used twice, once mirrored.
TEN_CROP_POSITIONS = (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), CENTRE
# The types of the pixels that DALI can write.
DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16, torch.uint8: types.UINT8}
RESERVED_BYTES = 2**31  # most GPU memory to reserve at the start for the decoded images of a batch

# DALI reuses allocations above this size, which is 32 MB by default. With that, the memory of smaller batches
# would be returned to the system and faulted in again page by page for each batch. DALI reads the variable at
# its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")


@dataclass(frozen=True)
class Decoding:
    """Where and how images are decoded.

    crop: side in pixels. threads: number of DALI threads. prefetch: number of batches to prepare ahead.
    hw_decoder_load: fraction of the images that the GPU's JPEG engine decodes, if the GPU has one. cores: the
    index of the core that each thread is pinned to; if empty, threads are not pinned. pipelines: number of
    DALI pipelines that prepare training batches in turn, with so many threads and batches each. dtype: the
    type of the pixels, a key of DTYPES; by default float16 on a GPU and float32 on a CPU, where converting to
    float16 would cost more than cropping, mirroring and normalising together.
    """

    crop: int = 224
    device: torch.device = field(default=torch.device("cpu"))
    threads: int = 2
    prefetch: int = 2
    hw_decoder_load: float = 0.65  # DALI's own default
    cores: tuple[int, ...] = ()
    pipelines: int = 1
    dtype: torch.dtype | None = None

    @property
    def output(self) -> torch.dtype:
        """The type of the pixels."""
        return self.dtype or (torch.float32 if self.device_id is None else torch.float16)

    @property
    def device_id(self) -> int | None:
        """The index of the GPU, or None on a CPU."""
        return self.device.index or 0 if self.device.type == "cuda" else None


@dataclass(frozen=True)
class GraphOptions:
    """The options of a graph.

    batch: maximum number of images in a batch. resize_shorter: the shorter side in pixels to which images are
    resized before they are cropped, or None if the shards hold images of the right size. max_width,
    max_height: the largest width and height of the dataset's images, in pixels.
    """

    decoding: Decoding
    batch: int
    resize_shorter: int | None
    max_width: int
    max_height: int


def jpeg_batch(jpegs: Iterable[memoryview]) -> TensorListCPU:
    """Wrap files as one DALI batch without copying them; the batch keeps their memory alive.

    DALI also accepts a list of arrays, but inspects each of them in Python, which takes three times as long.
    """
    return TensorListCPU([TensorCPU(jpeg) for jpeg in jpegs], contiguous=False)  # type: ignore[call-overload]


def reserved_size(options: GraphOptions) -> tuple[int, int]:
    """Return the width and height, in pixels, for which the decoder reserves memory in advance.

    They are the dataset's largest, scaled down if a batch of such images would take more than RESERVED_BYTES.
    The decoder allocates more when it meets a larger image.
    """
    batch_bytes = options.batch * options.max_width * options.max_height * 3
    scale = min(1.0, math.sqrt(RESERVED_BYTES / batch_bytes))
    return max(1, int(options.max_width * scale)), max(1, int(options.max_height * scale))


def _decoder(options: GraphOptions) -> dict[str, Any]:
    """Return the arguments that all decoders share."""
    on_gpu = options.decoding.device_id is not None
    width, height = reserved_size(options)
    return {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,  # the packer has done it, and DALI would also obey broken EXIF data
        # Otherwise the threads of all processes would be pinned to the machine's first cores.
        "affine": False,
        "preallocate_width_hint": width if on_gpu else None,
        "preallocate_height_hint": height if on_gpu else None,
        "hw_decoder_load": options.decoding.hw_decoder_load if on_gpu else None,
    }


def _decode(jpeg: Any, options: GraphOptions) -> Any:
    """Decode JPEG bytes to RGB [h,w,3], and resize the shorter side if the options say so."""
    images = fn.decoders.image(jpeg, **_decoder(options))
    if options.resize_shorter is not None:
        images = fn.resize(
            images,
            resize_shorter=options.resize_shorter,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            subpixel_scale=False,  # like Pillow, which resized the images of the other geometries
        )
    return images


def _decode_part(jpeg: Any, options: GraphOptions, anchor: Any, shape: Any) -> Any:
    """Decode a part of an image to RGB [h,w,3]."""
    return fn.decoders.image_slice(jpeg, anchor, shape, axes=[0, 1], **_decoder(options))


def _crop(images: Any, options: GraphOptions, **arguments: Any) -> Any:
    """Crop, mirror, subtract the mean, divide and convert in one operator."""
    decoding = options.decoding
    return fn.crop_mirror_normalize(
        images,
        crop=(decoding.crop, decoding.crop),
        dtype=DTYPES[decoding.output],
        output_layout="HWC",
        **arguments,
    )


def augment(jpeg: Any, options: GraphOptions, *, mean: Any, scale: Any, x: Any, y: Any, mirror: Any) -> Any:
    """Apply the operators that turn the inputs of a training sample into its pixels (see the module)."""
    images = _decode(jpeg, options)
    return _crop(images, options, crop_pos_x=x, crop_pos_y=y, mirror=mirror, mean=mean, std=scale)


def augment_resized(
    jpeg: Any, options: GraphOptions, *, mean: Any, scale: Any, mirror: Any, anchor: Any, shape: Any
) -> Any:
    """Do as `augment` does, but resize a part of the image to the size of the crop.

    Only the part is decoded. Its edges are not blended with what is beyond them, as in torchvision.
    """
    images, side = _decode_part(jpeg, options, anchor, shape), options.decoding.crop
    images = fn.resize(images, size=(side, side), interp_type=types.INTERP_LINEAR, antialias=True)
    return _crop(images, options, mirror=mirror, mean=mean, std=scale)


def _inputs(source: Callable, *others: tuple[Any, int]) -> Any:
    """Return the files and other inputs. others: the type and the number of dimensions of each."""
    return fn.external_source(
        source=source,
        num_outputs=1 + len(others),
        batch=True,
        no_copy=True,
        dtype=[types.UINT8, *(dtype for dtype, _ in others)],
        ndim=[1, *(dimensions for _, dimensions in others)],
    )


def _train(source: Callable, options: GraphOptions, resized: bool, only_decode: bool) -> Any:
    place = 2 * [(types.FLOAT, 1 if resized else 0)]
    if only_decode:
        jpeg, *part = _inputs(source, *(place if resized else ()))
        return _decode_part(jpeg, options, *part) if resized else _decode(jpeg, options)
    colours = 2 * [(types.FLOAT, 1)]
    jpeg, mean, scale, mirror, *place = _inputs(source, *colours, (types.INT32, 0), *place)
    given = {"mean": mean, "scale": scale, "mirror": mirror}
    if resized:
        return augment_resized(jpeg, options, **given, anchor=place[0], shape=place[1])
    return augment(jpeg, options, **given, x=place[0], y=place[1])


def _evaluate(
    source: Callable, options: GraphOptions, mean: Sequence[float], std: Sequence[float], ten_crops: bool
) -> Any:
    [jpeg] = _inputs(source)
    images = _decode(jpeg, options)
    positions = TEN_CROP_POSITIONS if ten_crops else (CENTRE,)
    crops = [
        _crop(images, options, crop_pos_x=x, crop_pos_y=y, mirror=mirror, mean=list(mean), std=list(std))
        for mirror in ((0, 1) if ten_crops else (0,))
        for x, y in positions
    ]
    return fn.stack(*crops) if ten_crops else crops[0]


def _build(graph: Callable, options: GraphOptions, *arguments: Any) -> Any:
    decoding = options.decoding
    if decoding.cores:
        os.environ["DALI_AFFINITY_MASK"] = ",".join(map(str, decoding.cores))  # read when the threads start
    pipeline = pipeline_def(graph)(
        *arguments,
        batch_size=options.batch,
        num_threads=decoding.threads,
        device_id=decoding.device_id,
        prefetch_queue_depth=decoding.prefetch,
        set_affinity=bool(decoding.cores),
    )
    pipeline.build()
    return pipeline


def find_undecodable(
    jpegs: Sequence[memoryview], sizes: Sequence[tuple[int, int]], options: GraphOptions
) -> list[int]:
    """Return the indices of the files of a batch that the decoder refuses.

    sizes: width and height of each image, in pixels. When memory is short, the decoder also refuses
    intact files, with the same message. Therefore a file counts only if the decoder takes plain images as
    large as those that it refuses, and then refuses the file again.
    """
    refused = _refused(jpegs, options)
    if _refused([_plain_jpeg(*sizes[index]) for index in refused], options):
        return []
    return [refused[index] for index in _refused([jpegs[index] for index in refused], options)]


def _refused(jpegs: Sequence[memoryview], options: GraphOptions) -> list[int]:
    """Decode each file by itself, because DALI's error does not say which one of a batch is at fault."""
    single = replace(options, batch=1, decoding=replace(options.decoding, prefetch=1))
    refused: list[int] = []
    done = 0

    def graph() -> Any:
        rest = ([np.asarray(jpeg)] for jpeg in jpegs[done:])
        return _decode(fn.external_source(source=rest, batch=True, dtype=types.UINT8, ndim=1), options)

    while done < len(jpegs):
        pipeline = _build(graph, single)  # a pipeline that failed cannot be used again
        try:
            while done < len(jpegs):
                pipeline.run()
                done += 1
        except RuntimeError:
            refused.append(done)
            done += 1
        del pipeline  # before there is another one
    return refused


def _plain_jpeg(width: int, height: int) -> memoryview:
    file = BytesIO()
    Image.new("L", (width, height)).save(file, "JPEG")
    return file.getbuffer()


def release_unused_memory() -> None:
    """Give back the memory that DALI keeps for later pipelines, so that others can use it."""
    ReleaseUnusedMemory()


def train_pipeline(
    source: Callable, options: GraphOptions, resized: bool = False, only_decode: bool = False
) -> Any:
    """Build the training pipeline, with random crop, mirror and colour.

    source() returns the inputs of a batch, in the order of the module's list, each with a row per sample. It
    raises StopIteration at the end. resized: whether the crops are random resized crops. only_decode: whether
    to leave everything after decoding, and after resizing whole images, to cpu_crop.py.
    """
    return _build(_train, options, source, options, resized, only_decode)


def evaluation_pipeline(
    source: Callable,
    options: GraphOptions,
    mean: Sequence[float],
    crops: int,
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Any:
    """Build the evaluation pipeline, which takes no random draws.

    source() returns a tuple of the input jpeg alone, or raises StopIteration at the end. mean, std: RGB [3],
    subtracted from the pixels, and their divisor after it. crops: 1 for the centre, or 10 for the four
    corners, the centre and their mirror images (section 4.1 of the paper).
    """
    return _build(_evaluate, options, source, options, mean, std, crops == 10)
