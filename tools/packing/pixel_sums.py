"""Mean and principal components of pixels, from exact streamed sums."""

from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
from PIL import Image

from pipeline.manifest import Pixels, Row

_PAIRS = tuple(combinations_with_replacement(range(3), 2))
# Pixels: 255² × 65,536 fits into 32 bits. einsum, as BLAS would start threads in each worker process.
_BLOCK = 65536


@dataclass
class PixelSums:
    """Integer sums over RGB pixels on 0–255: in whatever order they are added, the result is one."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))

    def add_image(self, image: Image.Image) -> None:
        channels = [np.asarray(channel).ravel() for channel in image.split()]
        self.count += len(channels[0])
        for start in range(0, len(channels[0]), _BLOCK):
            block = [channel[start : start + _BLOCK].astype(np.uint32) for channel in channels]
            self.total += [np.einsum("i->", channel) for channel in block]
            for one, other in _PAIRS:
                self.products[one, other] += np.einsum("i,i->", block[one], block[other])
                self.products[other, one] = self.products[one, other]

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
        def rounded(row: np.ndarray) -> Row:
            red, green, blue = (round(float(value), 6) for value in row)
            return red, green, blue

        first, second, third = (rounded(row) for row in vectors)
        return Pixels(
            mean=rounded(mean),
            eigenvalues=rounded(values),
            eigenvectors=(first, second, third),
        )
