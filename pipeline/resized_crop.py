"""Random resized crops, with the meaning of torchvision's RandomResizedCrop, from draws of the plan.

A crop is a part of the image with a random area and a random aspect ratio, which is resized to a square.
"""

import math

import numpy as np

from pipeline.plan import RESIZE_DRAWS, crop_offsets

_TRIES = (RESIZE_DRAWS - 2) // 2  # 10, as in torchvision; the last two draws are for the position


def resized_crops(
    draws: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Return the left and top edges and the widths and heights of crops, int64 [n,4], in pixels.

    draws: [n,RESIZE_DRAWS], uniform in [0, 1). width, height: [n], of the images, in pixels. scale: bounds of
    the share of the image's area, uniform between them. ratio: bounds of the width divided by the height,
    whose logarithm is uniform between theirs.

    The first of ten tries that fits into the image is taken, at a position uniform over whole pixels. If none
    fits, the crop is the largest part around the centre whose aspect ratio is within the bounds, and at least
    one pixel wide and high.
    """
    width, height = width.astype(np.int64), height.astype(np.int64)
    areas = (width * height)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspects = np.exp(low + (high - low) * draws[:, _TRIES : 2 * _TRIES])
    widths, heights = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = np.arange(len(draws)), fits.argmax(1)

    widest = np.where(width / height > ratio[1], np.maximum(np.rint(height * ratio[1]), 1), width)
    highest = np.where(width / height < ratio[0], np.maximum(np.rint(width / ratio[0]), 1), height)
    found = fits.any(1)
    w = np.where(found, widths[first], widest).astype(np.int64)
    h = np.where(found, heights[first], highest).astype(np.int64)
    left = np.where(found, crop_offsets(draws[:, -2], width, w), (width - w) // 2)
    top = np.where(found, crop_offsets(draws[:, -1], height, h), (height - h) // 2)
    return np.stack((left, top, w, h), 1)
