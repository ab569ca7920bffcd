"""All rows run once a round, so that a noisy machine is as noisy for all; figures of their times."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

LEAST_ROUNDS, MOST_ROUNDS = 5, 1000
LONG = 30.0  # seconds, after which a row is not run again to have the least rounds
PAUSE = 0.005  # seconds between two runs: thread pools spin for some milliseconds after their work
MANY = 100  # rounds from which on a percentile tells more than the smallest and the largest time
PERCENTILES = (90, 99)
FEWEST_PAIRS, RESAMPLES, TAIL = 3, 1000, 0.025

T = TypeVar("T")


def interleave(
    rows: Sequence[T],
    wants: Callable[[T], bool],
    run: Callable[[T, int], None],
    seed: int,
    pause: float = PAUSE,
) -> None:
    """Rounds until no row wants another: in each, all that still want one run once.

    run: given the row and the number of the round. seed: of the order, which is another one in every round,
    so that none always follows the same.
    """
    shuffle, number = random.Random(seed), 0
    while pending := [row for row in rows if wants(row)]:
        shuffle.shuffle(pending)
        for row in pending:
            time.sleep(pause)
            run(row, number)
        number += 1


def wants_round(seconds: Sequence[float], duration: float) -> bool:
    """Whether a row whose rounds took so long lacks its seconds, or five runs within half a minute."""
    spent = sum(seconds)
    few = len(seconds) < LEAST_ROUNDS and spent < LONG
    return few or (spent < duration and len(seconds) < MOST_ROUNDS)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, smallest, largest, and percentiles from 100 rounds on."""
    values = np.asarray(seconds) * 1e3
    figures = {"total_ms": np.median(values), "total_min_ms": values.min(), "total_max_ms": values.max()}
    if len(values) >= MANY:
        figures |= {f"total_p{mark}_ms": np.percentile(values, mark) for mark in PERCENTILES}
    return {name: float(value) for name, value in figures.items()}


def speedup(baseline: Mapping[int, float], own: Mapping[int, float], seed: int = 0) -> dict[str, Any]:
    """Median of `baseline` over that of `own`, seconds by round, of the rounds of both; {} without any.

    The interval is the central 95 % of a bootstrap of rounds, both sides of a round together, so that what
    slowed a whole round cancels; with fewer than three rounds there is none.
    """
    rounds = sorted(set(baseline) & set(own))
    if not rounds:
        return {}
    first, second = (np.array([side[number] for number in rounds]) for side in (baseline, own))
    value = float(np.median(first) / np.median(second))
    if len(rounds) < FEWEST_PAIRS:
        return {"speedup": value}
    chosen = np.random.default_rng(seed).integers(len(rounds), size=(RESAMPLES, len(rounds)))
    ratios = np.median(first[chosen], axis=1) / np.median(second[chosen], axis=1)
    # The order statistics themselves, so that the inverse ratio has the inverse interval.
    low = float(np.quantile(ratios, TAIL, method="lower"))
    high = float(np.quantile(ratios, 1 - TAIL, method="higher"))
    return {"speedup": value, "speedup_low": min(low, value), "speedup_high": max(high, value)}
