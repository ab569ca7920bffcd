"""What `validate quality` measures beside the set metrics: distances in chunks, pixels, spread in a class."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.validate.metrics.frechet import frechet_distance, gaussian_fit

Float64Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


def chunked_frechet(features: Float64Array, real: Float64Array, chunk: int = 1000) -> float:
    """Mean Frechet distance to `real` of random chunks of `features` (N, D).

    The distance is biased upwards in small sets, so that sets of different size cannot be compared: every
    figure here is for chunks of one size. The rows are permuted first (always in the same way), or a set
    ordered by class would be cut into chunks of few classes. Rows that do not fill a chunk are left out; a
    set smaller than one chunk is one.
    """
    order = np.random.default_rng(0).permutation(len(features))
    chunk = min(chunk, len(features))
    reference = gaussian_fit(real)
    starts = range(0, len(features) - chunk + 1, chunk)
    chunks = [gaussian_fit(features[order[i : i + chunk]]) for i in starts]
    return float(np.mean([frechet_distance(fit, reference, allow_few=True) for fit in chunks]))


class PixelComponents:
    """Principal components of real images: a feature space that no classifier has shaped."""

    def __init__(self, pixels: Float64Array, count: int = 64) -> None:
        """Fit to pixels (N, P) with N > count."""
        fit = gaussian_fit(pixels)
        self.mean = fit.mean
        self.basis = np.linalg.eigh(fit.covariance)[1][:, ::-1][:, :count]

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
