"""The sequence: regressed embeddings from the split on, codebook entries and kept positions elsewhere."""

from __future__ import annotations

import numpy as np

from ddexport.recipe import Limits
from ddexport.validate.metrics._base import (
    BoolArray,
    Comparison,
    DrawnPair,
    FloatArray,
    IntArray,
    StepPair,
    TextPair,
    largest_difference,
    relative_error,
)
from ddexport.validate.report import Measurement


def compare(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """Error of the features of texts, of the embeddings, of the positions that are copied, and of the
    sequences end to end."""
    rows = [features(pair, limits.embedding_error) for pair in comparison.texts]
    for pair in comparison.students:
        rows += [*regressed(pair, limits.embedding_error), copied(pair, limits.embedding_error)]
    return rows + [
        drawn(pair, limits.embedding_error) for pair in comparison.drawn if pair.got.sequence is not None
    ]


def features(pair: TextPair, limit: float) -> Measurement:
    """Relative error of the features of the worst text, in all rows: padded ones are zero on both sides."""
    everywhere = np.ones(pair.expected.shape[:2], dtype=np.bool_)
    error, row = relative_error(pair.expected, pair.got, everywhere)
    where, name = pair.places[row] if error else "", "features of the prompts, relative error"
    return Measurement("embeddings", pair.scope, name, error, limit, where=where, rule="embedding_error")


def drawn(pair: DrawnPair, limit: float) -> Measurement:
    """The sequences that were decoded, of the images whose tokens all agree; the others are counted
    elsewhere."""
    expected, got = pair.expected.sequence, pair.got.sequence
    assert expected is not None and got is not None
    mask = np.broadcast_to(pair.comparable[:, None], expected.shape[:2])
    error, row = relative_error(expected, got, mask)
    where, name = pair.places[row] if error else "", "sequence, relative error"
    return Measurement("embeddings", pair.scope, name, error, limit, where=where, rule="embedding_error")


def regressed(pair: StepPair, limit: float) -> list[Measurement]:
    """Relative error of what the embedding head wrote, and, as information, the largest error."""
    mask = _positions(pair) >= np.maximum(pair.known, pair.split)[:, None]
    rows = [_relative(pair, "embeddings, relative error", limit, mask)]
    if not pair.itself:
        largest, (row, position) = largest_difference(*_sequences(pair), mask)
        where = pair.place(row, position) if largest else ""
        rows.append(Measurement("embeddings", pair.scope, "embeddings, largest error", largest, where=where))
    return rows


def copied(pair: StepPair, limit: float) -> Measurement:
    """Relative error of what no head computes: kept positions, and codebook entries where the tokens agree.

    This is where a wrong split, a wrong `known` or a damaged codebook shows although every logit is right.
    """
    positions = _positions(pair)
    mask = (positions < pair.split) | (positions < pair.known[:, None])
    mask[:, : pair.split] &= ~pair.differing()
    return _relative(pair, "kept and codebook entries, relative error", limit, mask)


def _relative(pair: StepPair, name: str, limit: float, mask: BoolArray) -> Measurement:
    """The relative error over the masked positions of the worst row, and the worst position in it."""
    expected, got = _sequences(pair)
    error, row = relative_error(expected, got, mask)
    _, (_, position) = largest_difference(expected[[row]], got[[row]], mask[[row]])
    where = pair.place(row, position) if error else ""
    return Measurement("embeddings", pair.scope, name, error, limit, where=where, rule="embedding_error")


def _sequences(pair: StepPair) -> tuple[FloatArray, FloatArray]:
    assert pair.expected.sequence is not None and pair.got.sequence is not None
    return pair.expected.sequence, pair.got.sequence


def _positions(pair: StepPair) -> IntArray:
    shape = _sequences(pair)[0].shape[:2]
    return np.broadcast_to(np.arange(shape[1]), shape)
