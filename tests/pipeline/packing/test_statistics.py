"""The mean and the principal components equal those that numpy computes from all pixels at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.packing.statistics import PixelSums

ROUNDING = 5e-7  # to six decimals


def photo_like(seed: int, count: int = 3) -> list[np.ndarray]:
    """Return pictures of several sizes with correlated channels, like those of photos."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        height, width = rng.integers(1, 40, 2)
        light, tint = rng.normal(128, 60, (height, width, 1)), rng.normal(0, 20, (height, width, 3))
        pictures.append(np.clip(light + tint, 0, 255).astype(np.uint8))
    return pictures


def summed(pictures: list[np.ndarray]) -> PixelSums:
    sums = PixelSums()
    for picture in pictures:
        sums.add_image(Image.fromarray(picture))
    return sums


def covariance_and_mean(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures]).astype(float)
    return np.cov(pixels.T, bias=True), pixels.mean(0)


def assert_sums_are_exact(picture: np.ndarray) -> None:
    pixels = picture.reshape(-1, 3).astype(np.int64)
    sums = summed([picture])
    assert sums.count == len(pixels)
    np.testing.assert_array_equal(sums.total, pixels.sum(0))
    np.testing.assert_array_equal(sums.products, pixels.T @ pixels)
    assert sums.total.dtype == sums.products.dtype == np.int64


# Height and width on both sides of a block's size, and strips of both directions.
SIZES = [(1, 1), (1, 255), (1, 256), (1, 257), (257, 1), (3, 513), (256, 256), (375, 500), (4096, 7)]
SIZES += [(7, 4096)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("darkest", [0, 254, 255])  # 255 gives the largest possible sums
def test_sums_are_exact_for_every_size(size, darkest):
    assert_sums_are_exact(np.random.default_rng(0).integers(darkest, 256, (*size, 3), np.uint8))


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 600), seed=st.integers(0, 2**32 - 1))
def test_sums_are_exact_for_any_picture(height, width, seed):
    assert_sums_are_exact(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("seed", range(10))
def test_the_mean_and_components_are_those_of_all_pixels(seed):
    pictures = photo_like(seed)
    covariance, mean = covariance_and_mean(pictures)
    statistics = summed(pictures).statistics()
    values, vectors = np.array(statistics.eigenvalues), np.array(statistics.eigenvectors)
    np.testing.assert_allclose(statistics.mean, mean, rtol=0, atol=ROUNDING + 1e-9)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, rtol=0, atol=0.05)
    for value, vector in zip(values, vectors.T, strict=True):  # each column belongs to its value
        np.testing.assert_allclose(covariance @ vector, value * vector, rtol=0, atol=0.05)
    assert list(values) == sorted(values, reverse=True)
    assert values[-1] > 0


@pytest.mark.parametrize("seed", range(10))
def test_the_largest_entry_of_each_component_is_positive(seed):
    vectors = np.array(summed(photo_like(seed)).statistics().eigenvectors)
    assert (vectors.max(0) == np.abs(vectors).max(0)).all()


@settings(max_examples=50)
@given(data=st.data())
def test_the_order_and_grouping_of_pictures_do_not_matter(data):
    pictures = photo_like(data.draw(st.integers(0, 99)), count=6)
    whole = summed(pictures)
    order = data.draw(st.permutations(range(6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    grouped = PixelSums()
    for first, last in zip([0, *cuts], [*cuts, 6], strict=True):
        grouped.add(summed([pictures[i] for i in order[first:last]]))  # which may be empty
    assert grouped.count == whole.count
    np.testing.assert_array_equal(grouped.total, whole.total)
    np.testing.assert_array_equal(grouped.products, whole.products)
    assert grouped.statistics() == whole.statistics()


def test_sums_do_not_overflow_at_the_size_of_imagenet():
    white = summed([np.full((256, 256, 3), 255, np.uint8)])
    for _ in range(21):  # 2^21 images, more than ImageNet's 1.28 million
        white.add(white)
    assert white.count == 2 ** (16 + 21)
    assert white.products.tolist() == [[255**2 * 2**37] * 3] * 3
    assert white.statistics().mean == (255, 255, 255)
    np.testing.assert_allclose(white.statistics().eigenvalues, 0, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_a_single_gray_level_has_no_variance_and_orthonormal_components(level):
    statistics = summed([np.full((9, 5, 3), level, np.uint8)]).statistics()
    assert statistics.mean == (level,) * 3
    np.testing.assert_allclose(statistics.eigenvalues, 0, atol=1e-6)
    vectors = np.array(statistics.eigenvectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)


def test_gray_pictures_vary_only_along_the_gray_axis():
    levels = np.random.default_rng(0).integers(0, 256, (30, 20, 1), np.uint8)
    statistics = summed([levels.repeat(3, 2)]).statistics()
    # Three equal channels have three times their variance along (1,1,1)/√3.
    np.testing.assert_allclose(statistics.eigenvalues, [3 * levels.var(), 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.array(statistics.eigenvectors)[:, 0], 1 / np.sqrt(3), atol=1e-6)
    vectors = np.array(statistics.eigenvectors)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-5)
