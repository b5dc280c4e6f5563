"""Compute the mean and the principal components of pixels from exact sums over all images."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.colour import pixel_statistics
from pipeline.manifest import Pixels

# Pixels in a dot product. 255² × 256 < 2²⁴, so float32 holds each such sum and each partial sum exactly, in
# whatever order BLAS adds. For so few pixels, BLAS starts no threads.
_BLOCK = 256
# Pairs of red, green, blue and the constant 1. The products with the constant are the totals.
_FACTORS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3))
_PRODUCTS = np.array([[0, 1, 2], [1, 3, 4], [2, 4, 5]])  # the index in _FACTORS of each pair of channels


@dataclass
class PixelSums:
    """Integer sums over RGB pixels on 0–255, whose result does not depend on the order of adding.

    count: number of pixels. total: [3], sums of the channels. products: [3,3], sums of the products of two
    channels.
    """

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))

    def add_image(self, image: Image.Image) -> None:
        """Add the pixels of an RGB image."""
        width, height = image.size
        self.count += width * height
        channels = [np.frombuffer(image.tobytes("raw", band), np.uint8) for band in "RGB"]
        for left in range(0, width, _BLOCK):
            columns = slice(left, left + _BLOCK)
            block = [channel.reshape(height, width)[:, columns].astype(np.float32) for channel in channels]
            block.append(np.ones_like(block[0][0]))
            rows = np.array([np.vecdot(block[one], block[other]) for one, other in _FACTORS])
            sums = rows.sum(1, np.int64)
            self.products += sums[_PRODUCTS]
            self.total += sums[6:]

    def add(self, other: "PixelSums") -> None:
        """Add the sums over other pixels."""
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def statistics(self) -> Pixels:
        """Return the mean and the principal components of all pixels."""
        mean = self.total / self.count
        return pixel_statistics(mean, self.products / self.count - np.outer(mean, mean))
