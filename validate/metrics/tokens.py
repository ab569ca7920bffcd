"""Tokens before the split: do both pick the same codebook entry, and are the logits behind it the same.

A differing token is excused only where the reference itself was undecided: its logit of the token that the
bundle picked lies less than `token_margin` below its largest. That implies a top-2 margin below the limit,
and refuses the excuse to a bundle that picks some third token. Excused tokens are counted and shown.
"""

from __future__ import annotations

import numpy as np

from ddexport.validate.metrics import _draws
from ddexport.validate.metrics._base import (
    BoolArray,
    Comparison,
    DrawnPair,
    FloatArray,
    Limits,
    Measurement,
    StudentPair,
    largest_difference,
)
from ddexport.validate.metrics._distribution import distribution


def compare(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """Tokens and logits of each pair of student runs, what a teacher draws, and the tokens end to end."""
    rows: list[Measurement] = []
    for pair in comparison.students:
        rows += [differing_tokens(pair, limits.token_margin), logits_error(pair, limits.token_margin)]
        if not pair.itself:
            rows += distribution(pair.scope, pair.expected.logits, pair.got.logits, pair.decided(), limits)
    for teacher in comparison.teachers:
        rows += _draws.measure(teacher, limits)
    return rows + [drawn_tokens(pair) for pair in comparison.drawn]


def drawn_tokens(pair: DrawnPair) -> Measurement:
    """End to end each side goes on from its own tokens, so that their number is information."""
    differing = pair.expected_tokens != pair.got_tokens
    note = f"of {differing.size}, each side keeping its own tokens"
    counts = {"compared": differing.size, "differing": int(differing.sum())}
    value = float(differing.sum())
    return Measurement("tokens", pair.scope, "tokens that differ", value, note=note, counts=counts)


def margins(logits: FloatArray) -> FloatArray:
    """The largest logit minus the second largest: (..., V) -> (...)."""
    top = np.partition(logits, -2, axis=-1)[..., -2:]
    return np.asarray(top[..., 1] - top[..., 0], dtype=np.float32)


def excused(pair: StudentPair, limit: float) -> BoolArray:
    """(N, S): the differing positions where the reference's own choice hung on less than `limit`."""
    chosen = np.take_along_axis(pair.expected.logits, pair.got.tokens[..., None], axis=-1)[..., 0]
    lost = pair.expected.logits.max(axis=-1) - chosen
    return np.asarray(pair.differing() & (lost < limit))


def differing_tokens(pair: StudentPair, limit: float) -> Measurement:
    """The number of differing tokens that nothing excuses."""
    decided, differing, pardoned = pair.decided(), pair.differing(), excused(pair, limit)
    faults = differing & ~pardoned
    counts = {
        "compared": int(decided.sum()),
        "differing": int(differing.sum()),
        "excused": int(pardoned.sum()),
    }
    name = "tokens that differ"
    note = f"of {counts['compared']}" if decided.any() else "every token is kept from the step before"
    if pardoned.any():
        note += f"; {counts['excused']} more excused, margin below {limit:g}"
    return Measurement(
        "tokens",
        pair.scope,
        name,
        float(faults.sum()),
        limit=0.0,
        where=_worst(pair, faults if faults.any() else differing if differing.any() else decided),
        note=note,
        counts=counts,
    )


def logits_error(pair: StudentPair, limit: float) -> Measurement:
    """The largest error of a logit. Same limit: the excuse is honest only while rounding keeps to it."""
    everywhere = np.ones(pair.expected.logits.shape[:2], dtype=np.bool_)
    value, (row, position) = largest_difference(pair.expected.logits, pair.got.logits, everywhere)
    where = f"{pair.places[row]}, position {position}" if value else ""
    name = "logits, largest error"
    return Measurement("tokens", pair.scope, name, value, limit, where=where, rule="token_margin")


def _worst(pair: StudentPair, mask: BoolArray) -> str:
    """Among the masked positions the differing one with the largest margin, or else the closest call."""
    if not mask.any():
        return ""
    margin = margins(pair.expected.logits)
    differing = bool((pair.differing() & mask).any())
    key = np.where(mask, margin, -np.inf if differing else np.inf)
    row, position = np.unravel_index(int(key.argmax() if differing else key.argmin()), key.shape)
    text = f"{pair.places[row]}, position {position}, margin {margin[row, position]:.2g}"
    if not differing:
        return text
    wanted, got = pair.expected.tokens[row, position], pair.got.tokens[row, position]
    return f"{text}: {got} for {wanted}"
