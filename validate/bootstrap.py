"""Intervals by the bootstrap: how far a figure would move if other images had been drawn.

Why not scipy.stats.bootstrap: scipy is no dependency, and its percentiles are not centred on the value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95


class Interval(NamedTuple):
    """low, high: the central 95 % of the resampled values, moved to lie about the value. bias: how far they
    lie above the value on the average, which estimates how far the value lies above that of infinitely many
    images; it is reported and not taken off.
    """

    low: float
    high: float
    bias: float


def interval(value: float, resampled: npt.ArrayLike) -> Interval:
    """Of a value and what resampled sets gave for it, (R,).

    A set drawn with replacement repeats images, and a distance between sets grows when images repeat. So the
    resampled values are centred on the value before the quantiles are taken. Raises ValueError for fewer than
    two resampled values, or values that are not finite.
    """
    values = np.asarray(resampled, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError("an interval needs two resampled values at least, all finite")
    centre = float(values.mean())
    low, high = np.quantile(values - centre, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value + low), float(value + high), float(centre - value))
