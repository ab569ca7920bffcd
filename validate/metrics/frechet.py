"""Frechet distance of Gaussian fits to two sets of features: FID, where these are Inception's.

Source: Heusel et al., arXiv 1706.08500. The published scripts take the square root of an unsymmetric matrix,
which may fail, or return complex numbers; here are only eigenvalues of symmetric matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError

Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

BLOCK = 1000  # rows in double precision at once: 16 MiB of 2048 features


@dataclass(frozen=True)
class Gaussian:
    """mean (D,), unbiased covariance (D, D), float64, and of how many images; None if that is not known."""

    mean: Float64Array
    covariance: Float64Array
    count: int | None = None


@dataclass(frozen=True)
class GroupedMoments:
    """counts (G,), means (G, D) and scatter matrices (G, D, D) of the images i with i mod G = g, float64.

    From these every bootstrap set of whole groups is put together without the images. For N = 50,000 images
    of D = 2048 features: 2 N D^2 = 4.2e11 operations and G D^2 * 8 bytes = 640 MiB for G = 20, once a set;
    then 2 G D^2 = 1.7e8 operations a bootstrap set, where weighted images would take another 4.2e11.
    """

    counts: Float64Array
    means: Float64Array
    scatters: Float64Array

    @staticmethod
    def of(features: FloatArray, groups: int) -> GroupedMoments:
        """Of features (N, D), N >= 2, which may be memory-mapped."""
        width = features.shape[1]
        moments = GroupedMoments(
            np.zeros(groups), np.zeros((groups, width)), np.zeros((groups, width, width))
        )
        for group in range(min(groups, len(features))):
            rows = features[group::groups]
            blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
            mean = np.sum([block.sum(0, dtype=np.float64) for block in blocks], axis=0) / len(rows)
            moments.counts[group], moments.means[group] = len(rows), mean
            for block in blocks:  # about the mean, so that no digits are lost where it is large
                centred = block - mean
                moments.scatters[group] += centred.T @ centred
        return moments

    def weighted(self, times: npt.ArrayLike) -> Gaussian:
        """The fit to a set that holds every image of group g times[g] times."""
        factors = np.asarray(times, dtype=np.float64)
        weights = self.counts * factors
        count = weights.sum()
        mean = weights @ self.means / count
        shifts = self.means - mean
        scatter = np.tensordot(factors, self.scatters, 1) + (shifts.T * weights) @ shifts
        return Gaussian(mean, scatter / (count - 1), int(count))


class FrechetTo:
    """The distance to one reference, whose share of the work is done once.

    With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of the
    symmetric (F^T G)(F^T G)^T. The factors leave out the eigenvalues that are rounding errors of the zeros of
    a covariance without full rank. Rounded zeros are the one danger here: 1e-16 is nothing, its root 1e-8.
    """

    def __init__(self, reference: Gaussian) -> None:
        """Raises DDError for numbers that are not finite."""
        _check_finite(reference)
        self.mean, self.covariance = reference.mean, reference.covariance

    @cached_property
    def _factor(self) -> Float64Array:
        return _symmetric_factor(self.covariance)

    def distance(self, other: Gaussian) -> float:
        """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). Raises DDError for numbers that are not finite."""
        _check_finite(other)
        product = _symmetric_factor(other.covariance).T @ self._factor
        gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        return self._sum(other, gram)

    def rough_distance(self, other: Gaussian) -> float:
        """The same with one decomposition in place of two (2 s for D = 2048): without full rank right to
        1e-5 of the traces only, which is enough for the width of an interval.
        """
        return self._sum(other, self._factor.T @ other.covariance @ self._factor)

    def _sum(self, other: Gaussian, gram: Float64Array) -> float:
        values = np.linalg.eigvalsh((gram + gram.T) / 2) if gram.size else np.zeros(1)
        cross = np.sqrt(np.clip(values, 0, None)).sum()
        shift = other.mean - self.mean
        total = float(shift @ shift + np.trace(other.covariance) + np.trace(self.covariance) - 2 * cross)
        return max(total, 0.0)  # of equal sets: rounding


def gaussian(features: FloatArray) -> Gaussian:
    """The fit to features (N, D), N >= 2."""
    return GroupedMoments.of(features, 1).weighted([1])


def frechet(features: FloatArray, reference: FloatArray) -> float:
    """The distance between features (N, D) and (M, D), N, M >= 2; N <= D gives no full rank and a large bias.

    Raises DDError for numbers that are not finite.
    """
    return FrechetTo(gaussian(reference)).distance(gaussian(features))


def _symmetric_factor(covariance: Float64Array) -> Float64Array:
    """F (D, r) with F F^T = covariance, r its numerical rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _check_finite(fit: Gaussian) -> None:
    if not (np.isfinite(fit.mean).all() and np.isfinite(fit.covariance).all()):
        raise DDError(
            "a mean or covariance is not finite, so there is no Frechet distance",
            "The statistics file or the images are damaged.",
        )
