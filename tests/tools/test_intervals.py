"""Confidence intervals: small tables by hand, and how often they contain the true mean in simulations."""

import math

import numpy as np
import pytest

from tools.experiments.intervals import interval, paired_interval

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # from printed tables of Student's t


def test_an_interval_over_seeds_matches_a_computation_by_hand():
    # The mean of 1, 2, 3, 4, 5 is 3, and their variance 2.5; the standard error is √(2.5 / 5).
    mean, low, high = interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert (high - low) / 2 == pytest.approx(T_975[4] * math.sqrt(0.5), rel=1e-3)


def test_an_interval_over_seeds_and_images_matches_a_computation_by_hand():
    # Means of the seeds: 2 and 4; of the images: 1, 3 and 5; of all: 3. The residuals are ±1, 0 and ∓1.
    table = np.array([[1.0, 2, 3], [1, 4, 7]])
    # MS_seeds = 3 · 2 = 6 with 1 degree of freedom, MS_images = 2 · 4 = 8 with 2, and
    # MS_rest = (1 + 0 + 1 + 1 + 0 + 1) / (1 · 2) = 2 with 2. The sum is 6 + 8 − 2 = 12, over 6 cells.
    # Satterthwaite: 12² / (6²/1 + 8²/2 + 2²/2) = 144 / 70 = 2.057, so t is a little below that of 2.
    mean, low, high = paired_interval(table)
    assert mean == 3
    half = (high - low) / 2 / math.sqrt(12 / 6)
    assert T_975[2] - 0.2 < half < T_975[2]


@pytest.mark.parametrize(
    ("table", "variance", "freedom"),
    [  # MS_seeds is 3 · 2 = 6, the others are 0
        ([[2.0, 2, 2], [4, 4, 4]], 6 / 6, 1),
        # MS_images is 2 · 4 = 8, the others are 0
        ([[1.0, 3, 5], [1, 3, 5]], 8 / 6, 2),
        # MS_seeds is 0, MS_images 2 · 1 = 2 and MS_rest 2 (1 + 4 + 1) / 2 = 6: the estimate is negative
        ([[0.0, 4, 2], [2, 0, 4]], 2 / 6, 2),
    ],
)
def test_the_variance_is_at_least_that_of_either_factor_alone(table, variance, freedom):
    mean, low, high = paired_interval(np.array(table))
    assert mean == np.mean(table)
    assert (high - low) / 2 == pytest.approx(T_975[freedom] * math.sqrt(variance), rel=1e-3)


def test_a_table_without_noise_has_an_interval_of_no_width():
    assert paired_interval(np.full((3, 4), 2.0)) == (2, 2, 2)


@pytest.mark.parametrize(("seed_noise", "image_noise"), [(0.02, 0.3), (0.05, 0.05), (0.005, 0.5)])
def test_intervals_contain_the_true_mean_as_often_as_they_say(seed_noise, image_noise):
    rng, trials, hits, over_seeds = np.random.default_rng(0), 1000, 0, 0
    for _ in range(trials):
        seeds, images = rng.normal(0, seed_noise, (5, 1)), rng.normal(0, image_noise, 300)
        table = 0.01 + seeds + images + rng.normal(0, 0.4, (5, 300))
        _, low, high = paired_interval(table)
        hits += low <= 0.01 <= high
        _, low, high = interval(table.mean(1))
        over_seeds += low <= 0.01 <= high
    assert 0.92 <= hits / trials <= 0.99
    if image_noise > 5 * seed_noise:  # then an interval over seeds alone is far too narrow
        assert over_seeds / trials < 0.9
