"""Mean and principal components of pixels, from exact streamed sums."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.manifest import RGB, Pixels

# Pixels in a row of products. 255² × 256 < 2²⁴: float32 holds every such sum, and every part of it,
# exactly, in whatever order BLAS adds. For so short a row, BLAS starts no threads in a worker process.
_BLOCK = 256
# Of red, green, blue and one. The last three are the totals.
_FACTORS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3))
_PRODUCTS = np.array([[0, 1, 2], [1, 3, 4], [2, 4, 5]])  # where in _FACTORS each pair of channels is


@dataclass
class PixelSums:
    """Integer sums over RGB pixels on 0–255: in whatever order they are added, the result is one."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))

    def add_image(self, image: Image.Image) -> None:
        """image: RGB."""
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
        self.count += other.count
        self.total += other.total
        self.products += other.products

    def statistics(self) -> Pixels:
        """Mean, and the eigenvalues and eigenvectors of the covariance, largest first.

        Each eigenvector's sign is arbitrary; here its largest entry is positive.
        """
        mean = self.total / self.count
        values, vectors = np.linalg.eigh(self.products / self.count - np.outer(mean, mean))
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])

        # Rounded, so that another BLAS does not change the manifest in its last digits.
        def rounded(row: np.ndarray) -> RGB:
            red, green, blue = (round(float(value), 6) for value in row)
            return red, green, blue

        first, second, third = (rounded(row) for row in vectors)
        return Pixels(
            mean=rounded(mean),
            eigenvalues=rounded(values),
            eigenvectors=(first, second, third),
        )
