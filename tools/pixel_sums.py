"""Mean and principal components of pixels, from exact streamed sums."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.manifest import Pixels, Row


@dataclass
class PixelSums:
    """Integer sums over RGB pixels on 0–255: in whatever order they are added, the result is one."""

    count: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    products: np.ndarray = field(default_factory=lambda: np.zeros((3, 3), np.int64))

    def add_image(self, image: Image.Image) -> None:
        pixels = np.asarray(image).reshape(-1, 3).astype(np.float64)  # exact up to 2^53, and BLAS is fast
        self.count += len(pixels)
        self.total += pixels.sum(0).astype(np.int64)
        self.products += (pixels.T @ pixels).astype(np.int64)

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
