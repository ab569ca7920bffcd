"""From the times of rounds to figures: medians, percentiles, and ratios with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ddexport.validate.bench.rounds import Sample
from ddexport.validate.bootstrap import LEVEL

PARTS = ("student", "teacher", "decoder", "total")
FEWEST_PAIRS = 3
RESAMPLES = 1000


@dataclass(frozen=True)
class Ratio:
    """How many times faster; low and high are None for fewer than `FEWEST_PAIRS` rounds."""

    value: float
    low: float | None
    high: float | None


def part_ms(samples: Mapping[int, Sample], part: str) -> list[float]:
    """Milliseconds of one part, round by round."""
    return [getattr(sample.times, part) * 1e3 for _, sample in sorted(samples.items())]


def percentiles(values: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """The percentiles by their names, as in {"99": 12.5}; interpolated: few rounds tell little of 99."""
    found = np.percentile(np.asarray(values, dtype=np.float64), wanted)
    return {f"{name:g}": float(value) for name, value in zip(wanted, found, strict=True)}


def speedup(baseline: Mapping[int, float], own: Mapping[int, float], seed: int = 0) -> Ratio | None:
    """Median of `baseline` over that of `own`, of the rounds that both have; None without such a round.

    baseline, own: what an image takes, by the number of the round. The interval is the central 95 % of a
    bootstrap that draws rounds, both sides of a round together, so that what slowed a whole round cancels.
    """
    rounds = sorted(set(baseline) & set(own))
    if not rounds:
        return None
    first, second = (np.array([side[number] for number in rounds]) for side in (baseline, own))

    value = float(np.median(first) / np.median(second))
    if len(rounds) < FEWEST_PAIRS:
        return Ratio(value, None, None)
    chosen = np.random.default_rng(seed).integers(len(rounds), size=(RESAMPLES, len(rounds)))
    ratios = np.median(first[chosen], axis=1) / np.median(second[chosen], axis=1)
    tail = (1 - LEVEL) / 2
    # The order statistics themselves, so that the inverse ratio has the inverse interval.
    low = float(np.quantile(ratios, tail, method="lower"))
    high = float(np.quantile(ratios, 1 - tail, method="higher"))
    return Ratio(value, min(low, value), max(high, value))
