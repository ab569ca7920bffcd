"""Tokens: do both pick the same codebook entry, and are the logits behind it the same.

A differing token is excused only where the reference itself was undecided: its logit of the token that the
bundle picked lies less than `token_margin` below its largest. That implies a top-2 margin below the limit,
and refuses the excuse to a bundle that picks some third token. Excused tokens are counted and shown.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddexport.recipe import Limits
from ddexport.validate.metrics import _draws
from ddexport.validate.metrics._base import (
    BoolArray,
    Comparison,
    DrawnPair,
    FloatArray,
    StepPair,
    largest_difference,
)
from ddexport.validate.report import Measurement


def compare(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """Tokens and logits of each pair of steps, what a teacher draws, and the tokens end to end."""
    rows: list[Measurement] = []
    for pair in comparison.steps:
        rows += [differing_tokens(pair, limits.token_margin), logits_error(pair, limits.token_margin)]
        if not pair.itself and pair.decided().any():
            rows += distribution(pair, limits)
        if pair.sampling is not None and not pair.sampling.greedy:
            differing, pardoned = _draws.excused_draws(pair, limits.token_margin)
            rows.append(_counted(pair, "tokens that differ, drawn", differing, pardoned))
            if not pair.itself:
                rows.append(_draws.law(pair))
    return rows + [drawn_tokens(pair) for pair in comparison.drawn]


def drawn_tokens(pair: DrawnPair) -> Measurement:
    """End to end each side goes on from its own tokens, so that their number is information."""
    differing = pair.expected.tokens != pair.got.tokens
    note = f"of {differing.size}, each side keeping its own tokens"
    counts = {"compared": differing.size, "differing": int(differing.sum())}
    value = float(differing.sum())
    return Measurement("tokens", pair.scope, "tokens that differ", value, note=note, counts=counts)


def margins(logits: FloatArray) -> FloatArray:
    """The largest logit minus the second largest: (..., V) -> (...)."""
    top = np.partition(logits, -2, axis=-1)[..., -2:]
    return np.asarray(top[..., 1] - top[..., 0], dtype=np.float32)


def excused(pair: StepPair, limit: float) -> BoolArray:
    """(N, P): the differing positions where the reference's own choice hung on less than `limit`."""
    chosen = np.take_along_axis(pair.expected.logits, pair.got.tokens[..., None], axis=-1)[..., 0]
    lost = pair.expected.logits.max(axis=-1) - chosen
    return np.asarray(pair.differing() & (lost < limit))


def differing_tokens(pair: StepPair, limit: float) -> Measurement:
    """The number of differing tokens that nothing excuses; a teacher's are those that it would draw
    greedily."""
    name = "tokens that differ, largest" if pair.sampling else "tokens that differ"
    return _counted(pair, name, pair.differing(), excused(pair, limit))


def logits_error(pair: StepPair, limit: float) -> Measurement:
    """The largest error of a logit. Same limit: the excuse is honest only while rounding keeps to it."""
    everywhere = np.ones(pair.expected.logits.shape[:2], dtype=np.bool_)
    value, (row, position) = largest_difference(pair.expected.logits, pair.got.logits, everywhere)
    where = pair.place(row, position) if value else ""
    name = "guided logits, largest error" if pair.sampling else "logits, largest error"
    return Measurement("tokens", pair.scope, name, value, limit, where=where, rule="token_margin")


def distribution(pair: StepPair, limits: Limits) -> list[Measurement]:
    """Over all decided positions, of which there is one: errors that are small in every logit and still not
    rounding."""
    decided = pair.decided()
    expected, got = pair.expected.logits[decided], pair.got.logits[decided]  # (R, V)
    share = float(pair.differing()[decided].mean())
    rms = float(np.sqrt(np.square(got.astype(np.float64) - expected).mean()))
    bias = 0.5 * float(np.abs(_probabilities(got).mean(0) - _probabilities(expected).mean(0)).sum())
    note = f"{int(pair.differing().sum())} of {len(expected)}"
    rows = (
        ("share of tokens that differ", share, "tokens_differing", note),
        ("logits, rms error", rms, "logits_rms", ""),
        ("token histogram, bias", bias, "histogram_bias", ""),
    )
    return [
        Measurement("tokens", pair.scope, name, value, getattr(limits, rule), note=note, rule=rule)
        for name, value, rule, note in rows
    ]


def _probabilities(logits: FloatArray) -> npt.NDArray[np.float64]:
    """softmax (..., V), in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _counted(pair: StepPair, name: str, differing: BoolArray, pardoned: BoolArray) -> Measurement:
    """How many positions differ without an excuse. differing, pardoned: (N, P)."""
    faults = differing & ~pardoned
    masks = {"compared": pair.decided(), "differing": differing, "excused": pardoned}
    counts = {count: int(mask.sum()) for count, mask in masks.items()}
    note = f"of {counts['compared']}" if counts["compared"] else "every token is kept from the step before"
    if counts["excused"]:
        note += f"; {counts['excused']} more differ in a near tie of the logits"
    shown = next((mask for mask in (faults, differing, masks["compared"]) if mask.any()), None)
    where = "" if shown is None else _worst(pair, shown, bool(differing.any()))
    return Measurement("tokens", pair.scope, name, float(faults.sum()), 0.0, "at most", where, note, counts)


def _worst(pair: StepPair, mask: BoolArray, differing: bool) -> str:
    """Among the masked positions the differing one with the largest margin, or else the closest call."""
    margin = margins(pair.expected.logits)
    key = np.where(mask, -margin if differing else margin, np.inf)
    row, position = map(int, np.unravel_index(int(key.argmin()), key.shape))
    text = f"{pair.place(row, position)}, margin {margin[row, position]:.2g}"
    wanted, got = (int(side.tokens[row, position]) for side in (pair.expected, pair.got))
    return text if got == wanted else f"{text}: largest {got} for {wanted}"
