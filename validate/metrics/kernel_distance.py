"""Kernel distance (KID, Binkowski et al., arXiv 1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

Unlike the Frechet distance it has no bias in small sets, and may be negative when the sets are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.validate.bootstrap import LEVEL, RESAMPLES, Figure, figure
from ddexport.validate.statistics import TooFewSamples

Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

SUBSETS = 100
SIZE = 1000  # both as published


@dataclass(frozen=True)
class KernelDistance:
    """value: mean over the subsets. deviation: their standard deviation, which papers give as "+-".

    standard_error: of the value, for other images of the same number. Subsets of a share f of the rows, drawn
    without repetition, spread by the root of (1 - f) / f times as much as the value does. It errs on the
    large side: the larger set counts as if it had no more rows than the smaller. size: rows in a subset.
    independent: (1 - f) / f in whole numbers, at least 1, at most the subsets taken.
    """

    value: float
    standard_error: float
    deviation: float
    size: int
    independent: int
    subset_values: Float64Array

    def figure(self, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Figure:
        """The value with its interval: as many subsets as are independent, drawn with replacement."""
        rng = np.random.default_rng(seed)
        drawn = rng.choice(self.subset_values, (resamples, self.independent)).mean(1)
        centred = drawn - drawn.mean() + self.value  # unbiased: what is left of the mean is chance
        return figure(self.value, centred, level)


def kernel_distance(
    a: FloatArray, b: FloatArray, subsets: int = SUBSETS, size: int | None = None, seed: int = 0
) -> KernelDistance:
    """Between features (N, D) and (M, D), each of the sets cut into `subsets` subsets of `size` rows.

    Rows are taken in random order without repetition, and in another order when they are used up. size: None
    for 1000, or half of a smaller set; the value has no bias in any size, and large subsets the least spread.
    Raises TooFewSamples if the smaller set has no room for two disjoint subsets of 2 rows.
    """
    smaller = min(len(a), len(b))
    rows = min(SIZE, max(smaller // 2, 2)) if size is None else size
    if rows < 2 or subsets < 2 or smaller < 2 * rows:
        raise TooFewSamples(
            f"{smaller} images leave no room for two subsets of {rows} rows, so there is no kernel distance",
            f"Draw {2 * max(rows, 2)} at least.",
        )
    rng = np.random.default_rng(seed)
    order_a, order_b = _order(len(a), rows, subsets, rng), _order(len(b), rows, subsets, rng)
    values = np.array([mmd(a[i], b[j]) for i, j in zip(order_a, order_b, strict=True)])
    independent = min(subsets, max(1, smaller // rows - 1))
    deviation = float(values.std(ddof=1))
    error = deviation / independent**0.5
    return KernelDistance(float(values.mean()), error, deviation, rows, independent, values)


def mmd(a: FloatArray, b: FloatArray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, features (N, D), (M, D), N, M >= 2."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    within = _mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Float64Array, y: Float64Array) -> Float64Array:
    inner = x @ y.T / x.shape[1] + 1.0
    return np.asarray(inner * inner * inner)  # `** 3` would take ten times as long


def _mean_off_diagonal(matrix: Float64Array) -> float:
    return float((matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1)))


def _order(count: int, rows: int, subsets: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """(subsets, rows): row numbers, none twice in a subset, none again before all subsets of a round."""
    per_round = count // rows
    rounds = [
        rng.permutation(count)[: per_round * rows].reshape(per_round, rows)
        for _ in range(-(-subsets // per_round))
    ]
    return np.asarray(np.concatenate(rounds)[:subsets], dtype=np.int64)
