"""Image features from before CNNs: dense SIFT, encoded in two ways for a linear classifier.

Fisher vectors follow Perronnin, Sánchez and Mensink, ECCV 2010. Sparse codes, max-pooled over a spatial
pyramid, follow Yang, Yu, Gong and Huang, CVPR 2009, but with a fixed number of atoms per code. Needs the
extra `baselines`.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import cv2
import numpy as np
from skimage.feature import fisher_vector
from sklearn.decomposition import PCA, MiniBatchDictionaryLearning
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

PATCH = 16  # px of a descriptor's patch at its scale: four by four histograms of 4 px
COMPONENTS = 64  # of the PCA before the Gaussians; also the minimum number of descriptors to learn from
_MIN_VARIANCE = 1e-5  # of a Gaussian: all patches without a gradient have the same descriptor
_PENALTY = 0.15  # L1 penalty while learning the atoms
_LEARN_FROM = 8192  # descriptors to learn atoms from; each costs milliseconds
_NONZERO = 5  # atoms in a code
_PYRAMID = (1, 2, 4)  # cells along a side


def dense_sift(image: np.ndarray, step: int, scales: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute upright SIFT every `step` px, at up to `scales` scales √2 apart into which a patch fits.

    image: [side,side] uint8. Returns descriptors [n,128] of length 1, or 0 where a patch has no gradient,
    and the centres of their patches [n,2], with coordinates from 0 to 1.
    """
    sift, descriptors, places = cv2.SIFT_create(), [], []  # type: ignore[attr-defined]  # its stubs lack it
    for scale in range(scales):
        side = round(len(image) / 2 ** (scale / 2))
        if side <= PATCH:
            break
        scaled = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        middles = range(PATCH // 2, side - PATCH // 2, step)  # integers, to which OpenCV would round
        # A histogram of OpenCV's SIFT is 1.5 times as wide as the keypoint's size.
        keypoints = [cv2.KeyPoint(x, y, PATCH / 6, 0) for y in middles for x in middles]
        descriptors.append(sift.compute(scaled, keypoints)[1])
        places.append((np.array([(x, y) for y in middles for x in middles]) + 0.5) / side)
    found = np.concatenate(descriptors)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.maximum(lengths, 1.0), np.concatenate(places)  # OpenCV's have a length of 512


class Encoder(Protocol):
    """Arrays learned from descriptors [n,128]; `encode` maps a picture's descriptors to one unit vector."""

    @classmethod
    def fit(cls, descriptors: np.ndarray, words: int, seed: int) -> Self: ...

    @property
    def length(self) -> int: ...

    def encode(self, descriptors: np.ndarray, places: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Fisher:
    """Fisher vectors: normalised gradients of the log likelihood of a Gaussian mixture.

    The gradient is taken by the weights, means and deviations of a mixture over 64 principal components, each
    divided by its expected size, then power and L2 normalised.

    centre: [128], components: [64,128]; weights: [words], means, variances: [words,64] of the Gaussians.
    """

    centre: np.ndarray
    components: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @classmethod
    def fit(cls, descriptors: np.ndarray, words: int, seed: int) -> Self:
        pca = PCA(COMPONENTS, random_state=seed).fit(descriptors)
        mixture = GaussianMixture(
            words, covariance_type="diag", reg_covar=_MIN_VARIANCE, max_iter=50, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last of 50 rounds changes little
            mixture.fit(pca.transform(descriptors))
        return cls(pca.mean_, pca.components_, mixture.weights_, mixture.means_, mixture.covariances_)

    @property
    def length(self) -> int:
        return len(self.weights) * (1 + 2 * COMPONENTS)

    @cached_property
    def _mixture(self) -> GaussianMixture:
        """The mixture in the state that scikit-learn gives it after fitting."""
        mixture = GaussianMixture(len(self.weights), covariance_type="diag")
        mixture.weights_, mixture.means_, mixture.covariances_ = self.weights, self.means, self.variances
        mixture.precisions_cholesky_ = 1 / np.sqrt(self.variances)
        return mixture

    def encode(self, descriptors: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return [length]: entries for weights, then means, then deviations. Positions do not matter."""
        return fisher_vector((descriptors - self.centre) @ self.components.T, self._mixture, improved=True)


@dataclass(frozen=True)
class Sparse:
    """Sparse codes: the largest coefficient of each atom in each cell of a spatial pyramid, L2 normalised.

    atoms: [words,128], of length 1.
    """

    atoms: np.ndarray

    @classmethod
    def fit(cls, descriptors: np.ndarray, words: int, seed: int) -> Self:
        chosen = np.random.default_rng(seed).permutation(descriptors[descriptors.any(axis=1)])
        learner = MiniBatchDictionaryLearning(
            words,
            alpha=_PENALTY,
            max_iter=1,
            fit_algorithm="lars",
            dict_init=chosen[:words],  # the default has 128 atoms and zeros
            random_state=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # patches may be almost identical
            return cls(learner.fit(chosen[:_LEARN_FROM]).components_)

    @property
    def length(self) -> int:
        return len(self.atoms) * sum(level**2 for level in _PYRAMID)

    def encode(self, descriptors: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return [length]: the cells of the coarsest level first, row by row, with all atoms of each."""
        pooled = pool(np.abs(pursue(descriptors, self.atoms)), places)
        return pooled / max(np.linalg.norm(pooled), 1e-12)


def pursue(signals: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Find codes [n,words] of five atoms with codes @ atoms ≈ signals [n,128] (orthogonal matching pursuit).

    All signals are processed at once; scikit-learn's loop over them is ten times slower.
    """
    chosen = np.empty((len(signals), 0), np.int64)
    rest = signals
    for _ in range(_NONZERO):
        best = np.abs(rest @ atoms.T).argmax(1)
        chosen = np.concatenate((chosen, best[:, None]), 1)
        bases = atoms[chosen]  # [n,chosen,128]
        # The small term keeps the system solvable where an atom is chosen again, with no residual left.
        products = bases @ bases.transpose(0, 2, 1) + 1e-5 * np.eye(chosen.shape[1], dtype=atoms.dtype)
        weights = np.linalg.solve(products, bases @ signals[:, :, None])
        rest = signals - (weights * bases).sum(1)
    codes = np.zeros((len(signals), len(atoms)), atoms.dtype)
    np.add.at(codes, (np.arange(len(signals))[:, None], chosen), weights[:, :, 0])
    return codes


def pool(codes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return each column's largest value of codes [n,words] in each cell of the pyramid; 0 if it is empty."""
    cells = []
    for level in _PYRAMID:
        column, row = (places * level).astype(np.int64).T
        inside = row * level + column
        cells += [codes[inside == cell].max(0, initial=0.0) for cell in range(level**2)]
    return np.concatenate(cells)
