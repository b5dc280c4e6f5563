"""Colour augmentation by PCA: the covariance of the offsets is .01 · V diag(σ²) Vᵀ."""

import numpy as np
import pytest

from pipeline.colour import COLOURS, colour_deviations, colour_divisor, colour_offsets
from pipeline.manifest import Pixels

N = 100_000
# Similar to ImageNet's first component, which is nearly gray; signs are arbitrary.
GRAY = np.array([0.5635, 0.5762, 0.5920])


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    vectors, _ = np.linalg.qr(np.column_stack((GRAY, [1.0, 0.1, -1.0], [0.3, -1.0, 0.5])))
    values = np.array([121.78, 37.09, 19.72]) ** 2
    return Pixels(mean=(127.3, 119.72, 104.91), eigenvalues=values, eigenvectors=vectors.tolist())


def expected_deviations(colour: str, pixels: Pixels) -> np.ndarray:
    eigenvalues = np.array(pixels.eigenvalues)
    # λ is λ/255² for values from 0 to 1, and such an offset is 255 times as large for values from 0 to 255.
    return eigenvalues / 255**2 * 255 if colour == "paper" else eigenvalues**0.5


@pytest.mark.parametrize("colour", ["paper", "code2012"])
def test_offsets_have_the_covariance_of_the_pixels(colour, pixels):
    offsets = colour_offsets(colour, pixels, np.random.default_rng(0).standard_normal((N, 3)))
    vectors = np.array(pixels.eigenvectors)
    expected = 0.01 * vectors @ np.diag(expected_deviations(colour, pixels) ** 2) @ vectors.T
    # Of n normal samples, entry ij of the covariance has a variance of (Σii·Σjj + Σij²)/n.
    variances = np.diag(expected)
    errors = np.sqrt((np.outer(variances, variances) + expected**2) / N)
    assert (abs(offsets.T @ offsets / N - expected) < 5 * errors).all()
    assert (abs(offsets.mean(0)) < 5 * np.sqrt(variances / N)).all()


@pytest.mark.parametrize("colour", ["paper", "code2012"])
def test_each_draw_moves_pixels_along_its_own_component(colour, pixels):
    offsets = colour_offsets(colour, pixels, np.eye(3))
    for component, offset in enumerate(offsets):
        vector = np.array(pixels.eigenvectors)[:, component]
        deviation = 0.1 * expected_deviations(colour, pixels)[component]
        np.testing.assert_allclose(offset, deviation * vector, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_the_offset_of_an_image_does_not_depend_on_its_batch(count, pixels):
    normal = np.random.default_rng(0).standard_normal((64, 3))
    parts = [colour_offsets("paper", pixels, normal[i : i + count]) for i in range(0, len(normal), count)]
    np.testing.assert_array_equal(np.concatenate(parts), colour_offsets("paper", pixels, normal))


def test_imagenets_offsets_have_the_computed_deviations(pixels):
    # .1·√λ and .1·λ/255 for ImageNet's √λ = 121.78, 37.09, 19.72.
    np.testing.assert_allclose(colour_deviations("code2012", pixels), [12.178, 3.709, 1.972])
    np.testing.assert_allclose(colour_deviations("paper", pixels), [5.8159, 0.5395, 0.1525], rtol=1e-3)


def test_off_gives_offsets_of_zero(pixels):
    assert not colour_offsets("off", pixels, np.full((4, 3), 2.0)).any()


def test_only_code2012_divides_by_one_plus_its_strength():
    assert {colour: colour_divisor(colour) for colour in COLOURS} == {"paper": 1, "code2012": 1.1, "off": 1}
