"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), by k-th nearest neighbours.

A set's manifold is the union of the balls around its points that reach to their k-th neighbour. Precision is
the share of generated points in the real manifold, recall that of real points in the generated one. Both
sets should be of similar size: a larger one has smaller balls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.validate.statistics import TooFewSamples

Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

NEIGHBOURS = 3
BLOCK = 1000  # rows of distances at once: 80 MB against 10,000 points


@dataclass(frozen=True)
class Coverage:
    """inside (N,): which generated points lie in the real manifold. covered (M,): which real points lie in
    the generated one.
    """

    inside: BoolArray
    covered: BoolArray

    @property
    def precision(self) -> float:
        """Share of the generated points that could be real."""
        return float(self.inside.mean())

    @property
    def recall(self) -> float:
        """Share of the real points that could be generated."""
        return float(self.covered.mean())


def coverage(generated: FloatArray, real: FloatArray, k: int = NEIGHBOURS, block: int = BLOCK) -> Coverage:
    """Of features (N, D) and (M, D), in memory for `block` rows of distances.

    Raises TooFewSamples if a set has no k-th neighbours: k points or fewer.
    """
    for points in (generated, real):
        if len(points) <= k:
            raise TooFewSamples(
                f"{len(points)} images have no {k}-th neighbours, so there is no precision and recall",
                f"Draw {k + 1} at least; 10,000 are usual.",
            )
    a, b = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    radii_a, radii_b = _radii(a, k, block), _radii(b, k, block)
    inside = np.zeros(len(a), dtype=np.bool_)
    covered = np.zeros(len(b), dtype=np.bool_)
    for rows, distances in _blocks(a, b, block):
        inside[rows] = (distances <= radii_b[None, :]).any(1)
        covered |= (distances <= radii_a[rows, None]).any(0)
    return Coverage(inside, covered)


def precision_recall(generated: FloatArray, real: FloatArray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Both shares, of features (N, D), (M, D). Raises as `coverage`."""
    shares = coverage(generated, real, k)
    return shares.precision, shares.recall


def squared_distances(a: Float64Array, b: Float64Array) -> Float64Array:
    """(N, D), (M, D) -> (N, M). What cannot be told from rounding is 0, so that equal points are equal."""
    norms = (a**2).sum(1)[:, None] + (b**2).sum(1)[None]
    distances = norms - 2 * a @ b.T
    distances[distances < 1e-14 * norms] = 0.0
    return np.asarray(distances)


def _blocks(a: Float64Array, b: Float64Array, block: int) -> Iterator[tuple[slice, Float64Array]]:
    for start in range(0, len(a), block):
        rows = slice(start, min(start + block, len(a)))
        yield rows, squared_distances(a[rows], b)


def _radii(points: Float64Array, k: int, block: int) -> Float64Array:
    """Squared distance of each point to its k-th neighbour, itself not counted."""
    radii = np.empty(len(points))
    for rows, distances in _blocks(points, points, block):
        here = np.arange(rows.start, rows.stop)
        distances[here - rows.start, here] = -1.0  # first in the order, whatever rounding says
        radii[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii
