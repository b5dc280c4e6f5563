"""Fancy PCA: a random colour offset for each image each time it is used (section 4.1 of the paper).

The paper adds [p1,p2,p3]·[α1λ1, α2λ2, α3λ3]ᵀ to each pixel, α ~ N(0, .1²). It does not say on which scale the
eigenvalues λ are computed. On 0–255 the noise would drown the image (the largest λ is 14,830). The choices:

- `paper`     the text's formula with pixels on 0–1, which is a standard deviation of .1·λ/255 on 0–255;
- `code2012`  the published code's formula: √λ instead of λ, and the sum of pixel and offset divided by 1.1,
              which keeps the variance near that of the test images;
- `off`       no offset.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.manifest import RGB, Pixels

COLOURS = ("paper", "code2012", "off")
_ALPHA_STD = 0.1


def pixel_statistics(mean: np.ndarray, covariance: np.ndarray) -> Pixels:
    """Return the mean, and the eigenvalues and eigenvectors of the covariance, largest first.

    An eigenvector's sign is arbitrary: it is chosen so that the entry of largest magnitude is positive.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])

    # Rounding makes the manifest independent of the BLAS, whose last digits may differ.
    def rounded(row: np.ndarray) -> RGB:
        red, green, blue = (round(float(value), 6) for value in row)
        return red, green, blue

    first, second, third = (rounded(row) for row in vectors)
    return Pixels(
        mean=rounded(mean),
        eigenvalues=rounded(values),
        eigenvectors=(first, second, third),
    )


def mix_pixels(parts: Sequence[tuple[float, Pixels]]) -> Pixels:
    """Return the mean and the principal components of a mixture of pixels, given the share of each part.

    The mean is m = Σ s·mᵢ, and the covariance is Σ s·(Cᵢ + mᵢmᵢᵀ) − mmᵀ.
    """
    mean, moments = np.zeros(3), np.zeros((3, 3))
    for share, pixels in parts:
        own, vectors = np.array(pixels.mean), np.array(pixels.eigenvectors)
        mean += share * own
        moments += share * (vectors * pixels.eigenvalues @ vectors.T + np.outer(own, own))
    return pixel_statistics(mean, moments - np.outer(mean, mean))


def colour_deviations(colour: str, pixels: Pixels) -> np.ndarray:
    """Return the offset's standard deviations [3] along the principal components, on the 0–255 scale.

    colour: one of COLOURS. Raises KeyError for any other.
    """
    eigenvalues = np.array(pixels.eigenvalues)
    deviations = {"paper": eigenvalues / 255, "code2012": np.sqrt(eigenvalues), "off": np.zeros(3)}
    return _ALPHA_STD * deviations[colour]


def colour_offsets(colour: str, pixels: Pixels, normal: np.ndarray) -> np.ndarray:
    """Turn standard normal draws [n,3] into RGB offsets [n,3] to add, on the 0–255 scale.

    An image's offsets do not depend on the rest of the batch, to the last bit. Those of a matrix product
    would, because its order of operations depends on n.
    """
    scaled, vectors = normal * colour_deviations(colour, pixels), np.array(pixels.eigenvectors)
    return sum(scaled[:, [k]] * vectors[:, k] for k in range(3))


def colour_divisor(colour: str) -> float:
    """Return the number by which pixels with colour noise are divided: 1.1 in the 2012 code, else 1."""
    return 1.0 + _ALPHA_STD if colour == "code2012" else 1.0
