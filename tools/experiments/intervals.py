"""95 % confidence intervals of means, over seeds alone or over seeds and images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with the two ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return Student's t interval of the mean of independent values, one for each seed; at least two."""
    count = len(values)
    return _interval(float(np.mean(values)), float(np.var(values, ddof=1)) / count, count - 1)


def paired_interval(differences: np.ndarray) -> Interval:
    """Return the interval of the mean of a table [seeds,images], with at least two of each.

    The table holds the error of one net minus that of another for each seed and image. Seeds and images are
    both samples, of the possible trainings and of the possible images, and the mean depends on both: they
    are crossed random effects without replication. With S seeds, N images and the mean squares of the table,

        MS_seeds  = N · variance of the means of the seeds
        MS_images = S · variance of the means of the images
        MS_rest   = sum of the squared residuals of both effects / ((S − 1)(N − 1))

    the mean has the variance (MS_seeds + MS_images − MS_rest) / SN, whose expectation is exact (J. Cornfield
    and J. W. Tukey, Average values of mean squares in factorials, 1956). An estimate below max(MS_seeds,
    MS_images) / SN, which one effect alone would have, is raised to that. The degrees of freedom are
    Satterthwaite's (1946). On why each factor alone understates the variance, see A. B. Owen, The pigeonhole
    bootstrap, 2007.
    """
    seeds, images = differences.shape
    of_seed, of_image, mean = differences.mean(1), differences.mean(0), float(differences.mean())
    ms_seeds, ms_images = images * of_seed.var(ddof=1), seeds * of_image.var(ddof=1)
    residuals = differences - of_seed[:, None] - of_image + mean
    ms_rest = (residuals**2).sum() / ((seeds - 1) * (images - 1))
    total = ms_seeds + ms_images - ms_rest
    if total > max(ms_seeds, ms_images) * (1 + 1e-9):  # equal but for rounding counts as one effect
        parts = (ms_seeds, seeds - 1), (ms_images, images - 1), (ms_rest, (seeds - 1) * (images - 1))
        freedom = total**2 / sum(square**2 / own for square, own in parts)
    else:
        total, freedom = max((ms_seeds, seeds - 1), (ms_images, images - 1))
    return _interval(mean, total / (seeds * images), freedom)


def _interval(mean: float, variance: float, freedom: float) -> Interval:
    """Return the t interval of a mean whose estimated variance has this many degrees of freedom."""
    from scipy.stats import t  # importing it takes a second

    half = t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)
