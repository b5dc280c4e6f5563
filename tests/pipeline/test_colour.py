"""Fancy PCA: the offsets' covariance is .01 · V diag(σ²) Vᵀ."""

import numpy as np
import pytest

from pipeline.colour import COLOURS, colour_deviations, colour_divisor, colour_offsets
from pipeline.manifest import Pixels

N = 100_000
# Like ImageNet's (section 5 of the facts): the principal vector is a gray, the signs are arbitrary.
GRAY = np.array([0.5635, 0.5762, 0.5920])


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    vectors, _ = np.linalg.qr(np.column_stack((GRAY, [1.0, 0.1, -1.0], [0.3, -1.0, 0.5])))
    values = np.array([121.78, 37.09, 19.72]) ** 2
    return Pixels(mean=(127.3, 119.72, 104.91), eigenvalues=values, eigenvectors=vectors.tolist())


def deviations_of_the_facts(colour: str, pixels: Pixels) -> np.ndarray:
    eigenvalues = np.array(pixels.eigenvalues)
    # λ on the 0–1 scale is λ/255², and an offset of so much is 255 times as much on 0–255.
    return eigenvalues / 255**2 * 255 if colour == "paper" else eigenvalues**0.5


@pytest.mark.parametrize("colour", ["paper", "code2012"])
def test_covariance_of_the_offsets(colour, pixels):
    offsets = colour_offsets(colour, pixels, np.random.default_rng(0).standard_normal((N, 3)))
    vectors = np.array(pixels.eigenvectors)
    expected = 0.01 * vectors @ np.diag(deviations_of_the_facts(colour, pixels) ** 2) @ vectors.T
    # Of n normal samples, entry ij of the covariance has a variance of (Σii·Σjj + Σij²)/n.
    variances = np.diag(expected)
    errors = np.sqrt((np.outer(variances, variances) + expected**2) / N)
    assert (abs(offsets.T @ offsets / N - expected) < 5 * errors).all()
    assert (abs(offsets.mean(0)) < 5 * np.sqrt(variances / N)).all()


@pytest.mark.parametrize("colour", ["paper", "code2012"])
def test_a_draw_moves_pixels_along_its_own_component(colour, pixels):
    offsets = colour_offsets(colour, pixels, np.eye(3))
    for component, offset in enumerate(offsets):
        vector = np.array(pixels.eigenvectors)[:, component]
        deviation = 0.1 * deviations_of_the_facts(colour, pixels)[component]
        np.testing.assert_allclose(offset, deviation * vector, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_offsets_do_not_depend_on_what_else_is_drawn(count, pixels):
    normal = np.random.default_rng(0).standard_normal((64, 3))
    parts = [colour_offsets("paper", pixels, normal[i : i + count]) for i in range(0, len(normal), count)]
    np.testing.assert_array_equal(np.concatenate(parts), colour_offsets("paper", pixels, normal))


def test_deviations_of_imagenet(pixels):
    # .1·√λ and .1·λ/255 for √λ = 121.78, 37.09, 19.72 (section 5 of the facts).
    np.testing.assert_allclose(colour_deviations("code2012", pixels), [12.178, 3.709, 1.972])
    np.testing.assert_allclose(colour_deviations("paper", pixels), [5.8159, 0.5395, 0.1525], rtol=1e-3)


def test_off_is_none_at_all(pixels):
    assert not colour_offsets("off", pixels, np.full((4, 3), 2.0)).any()


def test_only_the_code_divides_by_one_plus_its_strength():
    assert {colour: colour_divisor(colour) for colour in COLOURS} == {"paper": 1, "code2012": 1.1, "off": 1}
