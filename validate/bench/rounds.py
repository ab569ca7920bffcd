"""Rows in turn, round after round, so that a noisy machine is as noisy for all; figures of their times."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ddexport.validate.bench.workload import Times
from ddexport.validate.bootstrap import LEVEL

LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
LONG = 60.0  # seconds; a teacher's image that takes longer is generated once
PAUSE = 0.005  # seconds between two runs: thread pools spin for some milliseconds after their work
FEWEST_PAIRS = 3
RESAMPLES = 1000


@dataclass(kw_only=True)
class Contender(ABC):
    """A row while it is timed. least: how many rounds it takes at least. times: by the number of the round.
    error: why it takes part no longer."""

    least: int = LEAST_ROUNDS
    times: dict[int, Times] = field(default_factory=dict)
    error: str | None = None

    @abstractmethod
    def run(self) -> Times:
        """One run."""

    def wants(self, duration: float) -> bool:
        """Whether it needs another round."""
        count, spent = len(self.times), sum(times.total for times in self.times.values())
        return self.error is None and (count < self.least or (spent < duration and count < MOST_ROUNDS))


def least_rounds(by_teacher: bool, seconds: float) -> int:
    """How many rounds a row needs whose first run took so long."""
    return 1 if by_teacher and seconds > LONG else LEAST_ROUNDS


def interleave(
    contenders: Sequence[Contender], duration: float, seed: int, errors: type[Exception], pause: float = PAUSE
) -> None:
    """Runs rounds until every contender has its time; in each, all that still want take one turn.

    duration: seconds of each contender. seed: of the order, which is another one in every round, so that
    none always follows the same. errors: what ends a contender, and not the benchmark.
    """
    shuffle, number = random.Random(seed), 0
    while pending := [contender for contender in contenders if contender.wants(duration)]:
        shuffle.shuffle(pending)
        for contender in pending:
            time.sleep(pause)
            try:
                contender.times[number] = contender.run()
            except errors as error:
                contender.error = str(error)
        number += 1


def percentiles(values: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    """The percentiles by their names, as in {"99": 12.5}; interpolated: few rounds tell little of 99."""
    results = np.percentile(np.asarray(values, dtype=np.float64), wanted)
    return {f"{name:g}": float(value) for name, value in zip(wanted, results, strict=True)}


class Ratio(NamedTuple):
    """How many times faster; low and high are None for fewer than `FEWEST_PAIRS` rounds."""

    value: float
    low: float | None
    high: float | None


def speedup(baseline: Mapping[int, float], own: Mapping[int, float], seed: int = 0) -> Ratio | None:
    """Median of `baseline` over that of `own`, of the rounds that both have; None without such a round.

    baseline, own: what an image takes, by the number of the round. The interval is the central 95 % of a
    bootstrap of rounds, both sides of a round together, so that what slowed a whole round cancels.
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
