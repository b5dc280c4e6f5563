"""The distributions of crop, mirror and colour draws.

The seed is fixed. Bounds are five standard errors of a statistic or, for chi-square, its quantile of
1 − 1e-6, so a sound generator would fail with fewer than one seed in a thousand.
"""

import numpy as np
import pytest

from pipeline.plan import crop_offsets, draws

N = 100_000
MILLIONTH = 4.753  # the standard normal's quantile of 1 − 1e-6


@pytest.fixture(scope="module")
def many():
    return draws(seed=2012, epoch=3, start=0, count=N)


def chi_square_quantile(freedom: int) -> float:
    """Return the quantile of 1 − 1e-6, by the approximation of Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + MILLIONTH * np.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_uniform_draws_fill_the_unit_square(many):
    assert many.uniform.shape == (N, 2)
    assert many.uniform.min() >= 0
    assert many.uniform.max() < 1
    counts, *_ = np.histogram2d(*many.uniform.T, bins=50, range=[(0, 1), (0, 1)])
    assert chi_square(counts) < chi_square_quantile(50**2 - 1)


def test_half_of_the_images_are_mirrored(many):
    assert many.mirror.shape == (N,)
    assert many.mirror.dtype == bool
    assert abs(many.mirror.mean() - 0.5) < 5 * 0.5 / np.sqrt(N)


def test_normals_are_standard_and_independent(many):
    assert many.normal.shape == (N, 3)
    assert np.isfinite(many.normal).all()
    assert (abs(many.normal.mean(0)) < 5 / np.sqrt(N)).all()
    # The variance of a product of two independent standard normals is 1, that of a square 2.
    errors = np.where(np.eye(3), np.sqrt(2 / N), np.sqrt(1 / N))
    assert (abs(many.normal.T @ many.normal / N - np.eye(3)) < 5 * errors).all()
    assert (abs((many.normal**4).mean(0) - 3) < 5 * np.sqrt(96 / N)).all()  # E n⁸ − 9 = 96


def test_draws_are_uncorrelated(many):
    columns = np.column_stack((many.uniform - 0.5, many.mirror - 0.5, many.normal, many.normal**2))
    correlation = np.corrcoef(columns.T)
    same = np.eye(9, dtype=bool)
    same[3:6, 6:9] = same[6:9, 3:6] = np.eye(3)  # a normal with its own square
    assert abs(correlation[~same]).max() < 5 / np.sqrt(N)
    following = np.corrcoef(columns[:-1].T, columns[1:].T)[:9, 9:]  # with the next position's draws
    assert abs(following).max() < 5 / np.sqrt(N)


def test_crops_are_uniform_over_all_33_offsets_of_each_axis(many):
    places = [crop_offsets(many.uniform[:, axis], np.full(N, 256), 224) for axis in (0, 1)]
    for offsets in places:
        assert set(offsets.tolist()) == set(range(33))
    counts = np.bincount(places[0] * 33 + places[1], minlength=33**2)
    assert counts.size == 33**2
    assert counts.min() > 0
    assert chi_square(counts) < chi_square_quantile(33**2 - 1)


def test_crops_reach_the_edges_of_images_of_any_size():
    extents = np.arange(224, 2000)
    below_one = np.full(len(extents), np.nextafter(1, 0))
    np.testing.assert_array_equal(crop_offsets(below_one, extents, 224), extents - 224)
    np.testing.assert_array_equal(crop_offsets(np.zeros(len(extents)), extents, 224), 0)
