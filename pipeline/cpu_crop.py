"""Call cpu_crop.c, which crops or resizes, mirrors and normalises decoded images in one pass on a CPU.

It replaces DALI's `crop_mirror_normalize` and, for random resized crops, `resize`, which take several times
as long. A crop that is not resized is the same bit for bit. Resized values are rounded to whole levels, as
DALI's are, and are within one level of Pillow's. DALI's are not if the image is reduced: because of its
approximate filter, they differ by up to 14 levels in noise and by 2 in smooth images.
"""

import ctypes
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import repeat
from typing import Any

import numpy as np
import torch

from pipeline.manifest import DatasetError

_IMAGE = np.dtype(
    [
        ("pixels", np.uintp),
        ("output", np.uintp),
        ("stride", np.int64),
        *((name, np.int32) for name in ("height", "width", "mirror")),
        *((name, np.float32, 3) for name in ("mean", "divisor")),
    ],
    align=True,
)  # the struct `Image` of cpu_crop.c


def open_library(path: str) -> ctypes.CDLL:
    """Load the shared library that has the kernel. Raises OSError if that fails."""
    library = ctypes.CDLL(path)
    library.crop_images.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return library


_spec = find_spec(f"{__package__}._cpu_crop")
if _spec is None or _spec.origin is None:
    raise OSError("it was not built; install a C compiler and reinstall the package to build it")
_LIBRARY = open_library(_spec.origin)


class Cropper:
    """Makes the pixels of batches from decoded images, in the memory of batches that are no longer in use.

    side: of the crops, in pixels. threads: number of threads that work on a batch.
    """

    def __init__(self, side: int, threads: int):
        self.side, self.threads = side, threads
        self._pool = ThreadPoolExecutor(threads)
        weakref.finalize(self, self._pool.shutdown).atexit = False
        # Memory that is new to the process is faulted in page by page, which takes longer than the kernel.
        self._unused: deque[np.ndarray] = deque(maxlen=2)

    def __call__(
        self,
        images: Iterable[Any],
        mean: np.ndarray,
        divisor: np.ndarray,
        mirror: np.ndarray,
        *place: np.ndarray,
    ) -> torch.Tensor:
        """Return pixels, fp32 [n,3,side,side] in channels_last format.

        images: n of them, uint8 [h,w,3], which numpy can view, such as a batch of DALI's. mean, divisor:
        [n,3]; each pixel becomes (pixel − mean) / divisor. mirror: [n], whether to flip left to right. place:
        the inputs x and y of a graph, [n] each; without them, images are resized to the size of the crop.
        Raises DatasetError if an image is smaller than its crop, and MemoryError.
        """
        arrays = [np.asarray(image) for image in images]
        records = np.zeros(len(arrays), _IMAGE)
        records["pixels"] = [array.ctypes.data for array in arrays]
        records["stride"] = [array.strides[0] for array in arrays]
        height, width, _ = np.array([array.shape for array in arrays]).T
        records["height"], records["width"] = height, width
        if place:
            if min(height.min(), width.min()) < self.side:
                raise DatasetError(
                    f"a decoded image is smaller than the crop of {self.side} px: pack it again"
                )
            x, y = (
                np.floor(position * (extent - self.side) + 0.5).astype(np.int64)  # as DALI rounds
                for position, extent in zip(place, (width, height), strict=True)
            )
            records["pixels"] += (y * records["stride"] + 3 * x).astype(np.uintp)
            records["height"] = records["width"] = self.side
        records["mean"], records["divisor"], records["mirror"] = mean, divisor, mirror
        output = self._allocate(len(records))
        records["output"] = output.ctypes.data + np.arange(len(records), dtype=np.uintp) * output[0].nbytes
        parts = np.array_split(records, self.threads)
        failures = list(self._pool.map(_crop, parts, repeat(self.side), repeat((arrays, output))))
        if any(failures):
            raise MemoryError(f"not enough memory for a few rows of {width.max()} pixels")
        return torch.from_numpy(output).permute(0, 3, 1, 2)

    def _allocate(self, count: int) -> np.ndarray:
        """Return an array whose memory is used again once nothing refers to it."""
        shape = (count, self.side, self.side, 3)
        memory = self._unused.pop() if self._unused else None
        if memory is None or memory.shape != shape:
            memory = np.empty(shape, np.float32)
        lent = memory.view()
        weakref.finalize(lent, self._unused.append, memory).atexit = False
        return lent


def _crop(images: np.ndarray, side: int, _used: object) -> int:
    """Process some images. Returns 1 if memory runs out.

    _used: what the images refer to, which must live until this ends, even if the caller is interrupted.
    """
    return _LIBRARY.crop_images(images.ctypes.data, len(images), side)
