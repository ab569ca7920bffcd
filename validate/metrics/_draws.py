"""What a teacher draws: the token that a number draws, and the law of many draws. Part of what `tokens`
measures; docs/validation.md explains the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ddexport.runtime.noise import uniform_numbers
from ddexport.runtime.teacher import Sampling, choose, weights
from ddexport.validate.metrics._base import BoolArray, FloatArray, IntArray, StepPair
from ddexport.validate.report import Measurement

CELLS = 8  # of about equal mass, into which the codebook is cut for the chi-square of a row
DRAWS = 64  # a row, so that a cell expects 8
LAW_ROWS = 256  # at most, spread over all images and positions: they are drawn from for seconds, not minutes
SMALLEST = 5  # what a cell has to expect
DRAW_SEED = 0x5EED  # another stream than the one that drew the tokens
MAX_DEVIATIONS = 5.0


def excused_draws(pair: StepPair, limit: float) -> tuple[BoolArray, BoolArray]:
    """(N, P) each: where the drawn tokens differ, and where a logit error of `limit` excuses that.

    Such an error moves the cumulated share F of a token by F (1 - F) (e^(2 limit / T) - 1) at most, which is
    below a quarter of that factor. And it may carry a token whose logit is within 2 limit of the threshold of
    top-k or top-p across it, which moves the shares by that token's mass. The number has to lie this close to
    the share at which the other side's token begins or ends.
    """
    assert pair.sampling is not None and pair.uniforms is not None
    expected, got, numbers = _rows(pair.expected.logits), _rows(pair.got.logits), pair.uniforms.reshape(-1)
    theirs = choose(got, numbers, pair.sampling)
    differing = choose(expected, numbers, pair.sampling) != theirs
    pardoned = np.zeros_like(differing)
    for row in np.flatnonzero(differing):
        other, number = int(theirs[row]), numbers[row]
        pardoned[row] = _is_close(expected[row], got[row], other, number, pair.sampling, limit)
    return differing.reshape(pair.uniforms.shape), pardoned.reshape(pair.uniforms.shape)


def _is_close(
    expected: FloatArray, got: FloatArray, other: int, number: float, sampling: Sampling, limit: float
) -> bool:
    mass, theirs = weights(expected[None], sampling)[0], weights(got[None], sampling)[0]
    slack = (np.exp(2 * limit / sampling.temperature) - 1) / 4
    crossed = (mass > 0) != (theirs > 0)
    if crossed.any():
        threshold = expected[mass > 0].min()
        if np.abs(expected[crossed] - threshold).max() > 2 * limit:
            return False
        both = np.maximum(mass / mass.sum(), theirs / theirs.sum())
        slack += both[crossed].sum()
    upper = np.cumsum(mass) / mass.sum()
    return bool(upper[other] - mass[other] / mass.sum() - slack <= number <= upper[other] + slack)


def chi_square(
    logits: FloatArray, reference: FloatArray, sampling: Sampling, draws: int
) -> tuple[float, int]:
    """Of tokens drawn from `logits` (R, V) against the probabilities of `reference` (R, V), summed over the
    rows, and its degrees of freedom. In a row the codebook is cut, in index order, into up to `CELLS` runs.
    """
    total, freedom = 0.0, 0
    for row, (own, wanted) in enumerate(zip(logits, reference, strict=True)):
        mass = weights(wanted[None], sampling)[0]
        share = np.cumsum(mass) / mass.sum()
        cell = np.minimum((share - mass / mass.sum() / 2) * CELLS, CELLS - 1).astype(np.int64)
        expected = np.bincount(cell, weights=mass / mass.sum() * draws, minlength=CELLS)
        cell = _without_small(cell, expected)
        expected = np.bincount(cell, weights=mass / mass.sum() * draws)
        numbers = uniform_numbers(DRAW_SEED, [row], draws)[0]
        tokens = choose(np.broadcast_to(own, (draws, len(own))), numbers, sampling)
        counts = np.bincount(cell[tokens], minlength=len(expected))
        total += float(((counts - expected) ** 2 / expected).sum())
        freedom += len(expected) - 1
    return total, freedom


def deviations(statistic: float, freedom: int) -> float:
    """How many standard deviations a chi-square lies above what is expected (Wilson and Hilferty, 1931)."""
    if freedom == 0:
        return 0.0
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


def _without_small(cell: IntArray, expected: npt.NDArray[Any]) -> IntArray:
    """Cells that expect too few draws go into the one before, the first of all into the first large one."""
    large = np.flatnonzero(expected >= SMALLEST)
    heads = large[np.maximum(np.searchsorted(large, np.arange(len(expected)), side="right") - 1, 0)]
    _, numbered = np.unique(heads, return_inverse=True)
    return np.asarray(numbered[cell], dtype=np.int64)


def law(pair: StepPair) -> Measurement:
    """The chi-square of many draws from the bundle's logits against the reference's probabilities."""
    assert pair.sampling is not None
    expected, got = _rows(pair.expected.logits), _rows(pair.got.logits)
    some = np.unique(np.linspace(0, len(got) - 1, LAW_ROWS).astype(np.int64))
    statistic, freedom = chi_square(got[some], expected[some], pair.sampling, DRAWS)
    value, note = deviations(statistic, freedom), f"{statistic:.0f} for {freedom} degrees of freedom"
    counts = {"draws": DRAWS * len(some), "freedom": freedom}
    name = "chi-square of draws, deviations"
    return Measurement("tokens", pair.scope, name, value, MAX_DEVIATIONS, note=note, counts=counts)


def _rows(logits: FloatArray) -> FloatArray:
    return logits.reshape(-1, logits.shape[-1])
