"""A teacher's distributions: the logits, the token that is largest, the token that a number draws, and the
law of many draws. Part of what `tokens` measures; docs/parity.md explains the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ddexport.runtime.noise import uniform_numbers
from ddexport.runtime.teacher import Sampling, choose, weights
from ddexport.validate.metrics._base import BoolArray, FloatArray, IntArray, Limits, Measurement, TeacherPair
from ddexport.validate.metrics._distribution import distribution

CELLS = 8  # of about equal mass, into which the codebook is cut for the chi-square of a row
DRAWS = 64  # a row, so that a cell expects 8
LAW_ROWS = 256  # at most, spread over all images and positions: they are drawn from for seconds, not minutes
SMALLEST = 5  # what a cell has to expect
DRAW_SEED = 0x5EED  # another stream than the one that drew the tokens
MAX_DEVIATIONS = 5.0


def measure(pair: TeacherPair, limits: Limits) -> list[Measurement]:
    """All rows of one pair."""
    rows = [_logits_error(pair, limits), _differing_largest(pair, limits)]
    if not pair.itself:
        everywhere = np.ones(pair.expected.shape[:2], dtype=np.bool_)
        rows += distribution(pair.scope, pair.expected, pair.got, everywhere, limits)
    if not pair.sampling.greedy:
        rows.append(_differing_drawn(pair, limits))
        if not pair.itself:
            rows.append(_law(pair))
    return rows


def excused_draws(pair: TeacherPair, limit: float) -> tuple[BoolArray, BoolArray]:
    """(N, P) each: where the drawn tokens differ, and where a logit error of `limit` excuses that.

    Such an error moves the cumulated share F of a token by F (1 - F) (e^(2 limit / T) - 1) at most, which is
    below a quarter of that factor. And it may carry a token whose logit is within 2 limit of the threshold of
    top-k or top-p across it, which moves the shares by that token's mass. The number has to lie this close to
    the share at which the other side's token begins or ends.
    """
    expected, got = _rows(pair.expected), _rows(pair.got)
    numbers = pair.uniforms.reshape(-1)
    differing = choose(expected, numbers, pair.sampling) != choose(got, numbers, pair.sampling)
    pardoned = np.zeros_like(differing)
    for row in np.flatnonzero(differing):
        other = int(choose(got[row : row + 1], numbers[row : row + 1], pair.sampling)[0])
        pardoned[row] = _is_close(expected[row], got[row], other, numbers[row], pair.sampling, limit)
    shape = pair.uniforms.shape
    return differing.reshape(shape), pardoned.reshape(shape)


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


def _law(pair: TeacherPair) -> Measurement:
    got, expected = _rows(pair.got), _rows(pair.expected)
    some = np.unique(np.linspace(0, len(got) - 1, LAW_ROWS).astype(np.int64))
    statistic, freedom = chi_square(got[some], expected[some], pair.sampling, DRAWS)
    return Measurement(
        "tokens",
        pair.scope,
        "chi-square of draws, deviations",
        deviations(statistic, freedom),
        limit=MAX_DEVIATIONS,
        note=f"{statistic:.0f} for {freedom} degrees of freedom",
        counts={"draws": DRAWS * len(some), "freedom": freedom},
    )


def _logits_error(pair: TeacherPair, limits: Limits) -> Measurement:
    error = np.abs(pair.got.astype(np.float64) - pair.expected).max(axis=-1)
    row, position = np.unravel_index(int(error.argmax()), error.shape)  # argmax takes the first NaN
    value = float(error[row, position])
    where = _place(pair, int(row), int(position)) if value else ""
    name = "guided logits, largest error"
    return Measurement(
        "tokens", pair.scope, name, value, limits.token_margin, where=where, rule="token_margin"
    )


def _differing_largest(pair: TeacherPair, limits: Limits) -> Measurement:
    wanted, got = pair.expected.argmax(-1), pair.got.argmax(-1)
    lost = pair.expected.max(-1) - np.take_along_axis(pair.expected, got[..., None], axis=-1)[..., 0]
    differing = wanted != got
    return _counted(pair, "tokens that differ, largest", differing, lost < limits.token_margin)


def _differing_drawn(pair: TeacherPair, limits: Limits) -> Measurement:
    differing, pardoned = excused_draws(pair, limits.token_margin)
    return _counted(pair, "tokens that differ, drawn", differing, pardoned)


def _counted(pair: TeacherPair, name: str, differing: BoolArray, pardon: BoolArray) -> Measurement:
    faults = differing & ~pardon
    counts = {
        "compared": differing.size,
        "differing": int(differing.sum()),
        "excused": int((differing & pardon).sum()),
    }
    note = f"of {counts['compared']}"
    if counts["excused"]:
        note += f"; {counts['excused']} more excused"
    worst = np.argwhere(faults if faults.any() else differing)
    where = _place(pair, int(worst[0][0]), int(worst[0][1])) if len(worst) else ""
    return Measurement(
        "tokens", pair.scope, name, float(faults.sum()), limit=0.0, where=where, note=note, counts=counts
    )


def _place(pair: TeacherPair, row: int, position: int) -> str:
    return f"{pair.places[row]}, position {pair.start + position}"


def _rows(logits: FloatArray) -> FloatArray:
    return logits.reshape(-1, logits.shape[-1])
