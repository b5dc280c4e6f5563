"""Fancy PCA: a random colour offset for each image each time it is used (section 4.1 of the paper).

The paper adds [p1,p2,p3]·[α1λ1, α2λ2, α3λ3]ᵀ to each pixel, α ~ N(0, .1²). It does not say on which scale the
eigenvalues λ are computed. On 0–255 they would drown the image (14,830), so here:

- `paper`     the text's formula with pixels on 0–1, which on 0–255 is a standard deviation of .1·λ/255;
- `code2012`  what the published code does: √λ in place of λ, and the sum divided by 1.1, which keeps the
              variance near that of the test images;
- `off`       no offset.
"""

import numpy as np

from pipeline.manifest import Pixels

COLOURS = ("paper", "code2012", "off")
_ALPHA_STD = 0.1


def colour_deviations(colour: str, pixels: Pixels) -> np.ndarray:
    """Return the offset's standard deviations [3] along the principal components, on the 0–255 scale."""
    eigenvalues = np.array(pixels.eigenvalues)
    deviations = {"paper": eigenvalues / 255, "code2012": np.sqrt(eigenvalues), "off": np.zeros(3)}
    return _ALPHA_STD * deviations[colour]


def colour_offsets(colour: str, pixels: Pixels, normal: np.ndarray) -> np.ndarray:
    """Turn standard normal draws [n,3] into RGB offsets [n,3] to add, on the 0–255 scale.

    An image's offsets are bitwise the same whatever else is in the batch. A matrix product's would not be:
    its order of operations depends on n.
    """
    scaled, vectors = normal * colour_deviations(colour, pixels), np.array(pixels.eigenvectors)
    return sum(scaled[:, [k]] * vectors[:, k] for k in range(3))


def colour_divisor(colour: str) -> float:
    """Return what the 2012 code divides pixels with colour noise by: one plus the noise's strength."""
    return 1.0 + _ALPHA_STD if colour == "code2012" else 1.0
