"""Frechet distance of Gaussian fits to two sets of features: FID, where these are Inception's.

Source: Heusel et al., arXiv 1706.08500. The published scripts take the square root of an unsymmetric matrix,
which may fail, or return complex numbers; here are only eigenvalues of symmetric matrices.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError
from ddexport.validate.statistics import Gaussian, GaussianFit, TooFewSamples

Float64Array: TypeAlias = npt.NDArray[np.float64]


def gaussian_fit(features: npt.NDArray[np.floating[Any]]) -> Gaussian:
    """Mean and unbiased covariance of features (N, D), N >= 2, in float64."""
    rows = np.asarray(features, dtype=np.float64)
    return Gaussian(rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)), len(rows))


def require_samples(fit: GaussianFit, allow_few: bool = False) -> None:
    """Raises TooFewSamples if the covariance cannot have full rank: N <= D. Below two it never is allowed."""
    width = len(fit.mean)
    if fit.count is not None and fit.count <= (1 if allow_few else width):
        raise TooFewSamples(
            f"{fit.count} images do not determine a Frechet distance in {width} features",
            f"Draw {2 if allow_few else width + 1} at least; the published figures are for 50,000."
            + ("" if allow_few else " --allow-few measures all the same: such figures compare with nothing."),
        )


def frechet_distance(a: GaussianFit, b: GaussianFit, *, allow_few: bool = False) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)): squared 2-Wasserstein distance of two Gaussians.

    Args:
        a, b: mean (D,), covariance (D, D), float64.
        allow_few: take covariances of D images or fewer, which have no full rank.

    Raises:
        TooFewSamples: N <= D for one of the sets, without `allow_few`.
        DDError: numbers that are not finite.
    """
    require_samples(a, allow_few)
    return FrechetTo(b, allow_few=allow_few).distance(a)


class FrechetTo:
    """The distance to one reference, whose share of the work is done once.

    With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of the
    symmetric (F^T G)(F^T G)^T. The factors leave out the eigenvalues that are rounding errors of the zeros of
    a covariance without full rank. Rounded zeros are the one danger here: 1e-16 is nothing, its root 1e-8.
    """

    def __init__(self, reference: GaussianFit, *, allow_few: bool = False) -> None:
        """Raises as `frechet_distance` does."""
        require_samples(reference, allow_few)
        self.mean = reference.mean
        self.covariance = reference.covariance
        _check_finite(self.mean, self.covariance)

    @cached_property
    def _factor(self) -> Float64Array:
        return _symmetric_factor(self.covariance)

    def distance(self, other: GaussianFit) -> float:
        """To the reference; the check for too few images is the caller's."""
        covariance = other.covariance
        _check_finite(other.mean, covariance)
        product = _symmetric_factor(covariance).T @ self._factor
        gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        return self._sum(other.mean, covariance, gram)

    def rough_distance(self, other: GaussianFit) -> float:
        """The same with one decomposition in place of two: without full rank right to about 1e-5 of the
        traces only, which is enough for the width of an interval.
        """
        covariance = other.covariance
        return self._sum(other.mean, covariance, self._factor.T @ covariance @ self._factor)

    def _sum(self, mean: Float64Array, covariance: Float64Array, gram: Float64Array) -> float:
        values = np.linalg.eigvalsh((gram + gram.T) / 2) if gram.size else np.zeros(1)
        cross = np.sqrt(np.clip(values, 0, None)).sum()
        shift = mean - self.mean
        total = float(shift @ shift + np.trace(covariance) + np.trace(self.covariance) - 2 * cross)
        return max(total, 0.0)  # of equal sets: rounding


def _symmetric_factor(covariance: Float64Array) -> Float64Array:
    """F (D, r) with F F^T = covariance, r its numerical rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def _check_finite(*arrays: Float64Array) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise DDError(
            "a mean or covariance is not finite, so there is no Frechet distance",
            "The statistics file or the images are damaged.",
        )


def frechet(features: npt.NDArray[np.floating[Any]], reference: npt.NDArray[np.floating[Any]]) -> float:
    """The distance of features (N, D) to a reference (M, D)."""
    return frechet_distance(gaussian_fit(features), gaussian_fit(reference))
