"""Distances between two sets of images in some feature space: Frechet, within-class spread, precision and
recall.

Used by `validate quality`; a bundle's parity does not involve them.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of a set of features, float64."""

    mean: Float64Array
    covariance: Float64Array


def moments(features: Float64Array) -> Moments:
    """Of features (N, D), N >= 2; the covariance is the unbiased one."""
    features = np.asarray(features, dtype=np.float64)
    return Moments(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)): squared 2-Wasserstein distance of two Gaussians.

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric:
    no square root of an unsymmetric matrix is needed, and no complex parts have to be thrown away.
    Eigenvalues that rounding made negative count as 0. Source: Heusel et al., arXiv 1706.08500.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ b.covariance @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def chunked_frechet(features: Float64Array, real: Float64Array, chunk: int = 1000) -> float:
    """Mean Frechet distance to `real` of random chunks of `features` (N, D).

    The distance is biased upwards in small sets, so that sets of different size cannot be compared: every
    figure here is for chunks of one size. The rows are permuted first (always in the same way), or a set
    ordered by class would be cut into chunks of few classes. Rows that do not fill a chunk are left out; a
    set smaller than one chunk is one.
    """
    order = np.random.default_rng(0).permutation(len(features))
    chunk = min(chunk, len(features))
    reference = moments(real)
    starts = range(0, len(features) - chunk + 1, chunk)
    return float(
        np.mean([frechet_distance(moments(features[order[i : i + chunk]]), reference) for i in starts])
    )


class PixelComponents:
    """Principal components of real images: a feature space that no classifier has shaped."""

    def __init__(self, pixels: Float64Array, count: int = 64) -> None:
        """Fit to pixels (N, P) with N > count."""
        self.mean, covariance = moments(pixels)
        self.basis = np.linalg.eigh(covariance)[1][:, ::-1][:, :count]

    def __call__(self, pixels: Float64Array) -> Float64Array:
        """pixels (N, P) -> coordinates (N, count)."""
        return np.asarray((pixels - self.mean) @ self.basis, dtype=np.float64)


def within_class_variance(features: Float64Array, labels: IntArray) -> float:
    """Mean over the classes of the total variance (summed over D) inside the class; features (N, D), labels
    (N,).
    """
    spreads = [
        features[labels == c].var(0, ddof=1).sum() for c in np.unique(labels) if (labels == c).sum() > 1
    ]
    return float(np.mean(spreads))


def precision_recall(generated: Float64Array, real: Float64Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features (N, D), (M, D).

    A set's manifold is the union of the balls around its points that reach to their k-th neighbour. Precision
    is the share of generated points in the real manifold, recall that of real points in the generated one.
    Both sets should be of similar size: a larger one has smaller balls.
    """
    across = squared_distances(generated, real)
    precision = (across <= _radii(real, k)[None, :]).any(1).mean()
    recall = (across <= _radii(generated, k)[:, None]).any(0).mean()
    return float(precision), float(recall)


def squared_distances(a: Float64Array, b: Float64Array) -> Float64Array:
    """(N, D), (M, D) -> (N, M)."""
    return np.asarray(np.clip((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0, None))


def _radii(points: Float64Array, k: int) -> Float64Array:
    """Squared distance of each point to its k-th neighbour, itself not counted."""
    distances = squared_distances(points, points)
    np.fill_diagonal(distances, -1.0)  # first in the order, whatever rounding says
    return np.asarray(np.partition(distances, k, axis=1)[:, k], dtype=np.float64)
