"""From the times of rounds to figures: medians, percentiles, and ratios with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from validate.bench.rounds import Sample
from validate.bootstrap import bootstrap

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
    bootstrap that draws rounds, both sides of a round together, so that what slowed a whole round cancels. It
    is taken of the logarithm, and so is the other way round for the inverse ratio.
    """
    rounds = sorted(set(baseline) & set(own))
    if not rounds:
        return None
    first, second = (np.array([side[number] for number in rounds]) for side in (baseline, own))

    def of_rounds(index: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        return float(np.log(np.median(first[index]) / np.median(second[index])))

    value = of_rounds(np.arange(len(rounds)))
    if len(rounds) < FEWEST_PAIRS:
        return Ratio(float(np.exp(value)), None, None)
    spread = bootstrap(value, of_rounds, len(rounds), seed, RESAMPLES)
    low, high = min(spread.low, value), max(spread.high, value)
    return Ratio(*(float(np.exp(number)) for number in (value, low, high)))
