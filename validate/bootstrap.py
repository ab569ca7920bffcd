"""Intervals by the bootstrap: how far a figure would move if other images had been drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Float64Array: TypeAlias = npt.NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 200


@dataclass(frozen=True)
class Figure:
    """A value with the interval around it.

    low, high: the central `level` of the bootstrap spread, centred on the value. bias: by how much the
    resampled values lie above the value on the average, which estimates how far the value itself lies above
    that of infinitely many images. It is told and not taken off.
    """

    value: float
    low: float
    high: float
    level: float = LEVEL
    bias: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "bias": self.bias,
        }


def figure(value: float, resampled: npt.ArrayLike, level: float = LEVEL) -> Figure:
    """A value and what bootstrap sets gave for it, (R,), as a `Figure`.

    A set drawn with replacement repeats images, and a distance between sets grows when images repeat. So the
    resampled values are centred on the value before the quantiles are taken; the shift is the bias. Raises
    ValueError for fewer than two resampled values, or values that are not finite.
    """
    values = np.asarray(resampled, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError("an interval needs two resampled values at least, all finite")
    centre = float(values.mean())
    low, high = np.quantile(values - centre, [(1 - level) / 2, (1 + level) / 2])
    return Figure(value, value + float(low), value + float(high), level, centre - value)


def bootstrap(
    value: float,
    of_rows: Callable[[npt.NDArray[np.int64]], float],
    rows: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Figure:
    """The interval of a figure that is computed from a choice of rows: `of_rows(indices (rows,))`."""
    rng = np.random.default_rng(seed)
    return figure(value, [of_rows(rng.integers(rows, size=rows)) for _ in range(resamples)], level)
