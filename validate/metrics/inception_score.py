"""Inception Score (Salimans et al., arXiv 1606.03498): exp of the mean KL divergence of p(y|x) from p(y).

It is the published score where the probabilities are those of Inception's 1008 logits without their bias;
with another classifier it is the same measure on another scale, at most the number of its classes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError

Float64Array: TypeAlias = npt.NDArray[np.float64]

SPLITS = 10
GROUPS = 200


def inception_score(probabilities: npt.NDArray[np.floating[Any]], splits: int = SPLITS) -> float:
    """Mean score of the splits, of probabilities (N, K), N >= splits: image i is in split i mod `splits`.

    Raises DDError for fewer images than splits, ValueError for what are no probabilities.
    """
    return float(resampled_scores(probabilities, np.ones((1, splits)), splits)[0])


def resampled_scores(
    probabilities: npt.NDArray[np.floating[Any]], times: npt.ArrayLike, splits: int = SPLITS
) -> Float64Array:
    """(R,): the scores of R sets that hold each image i times[r, i mod G] times; times (R, G), G a multiple
    of `splits`. Raises as `inception_score`.
    """
    weights = np.asarray(times, dtype=np.float64)
    if len(probabilities) < splits:
        raise DDError(
            f"{len(probabilities)} images do not fill {splits} splits of the Inception Score",
            "Draw more images.",
        )
    groups, classes = weights.shape[1], probabilities.shape[1]
    counts, sums, certainty = np.zeros(groups), np.zeros((groups, classes)), np.zeros(groups)
    for group in range(min(groups, len(probabilities))):
        p = probabilities[group::groups].astype(np.float64)
        if not (p >= 0).all() or not np.allclose(p.sum(1), 1, atol=1e-3):
            raise ValueError("probabilities must be at least 0 and sum to 1")
        p /= p.sum(1, keepdims=True)  # a float32 softmax sums to 1 within 1e-6 only
        counts[group], sums[group], certainty[group] = len(p), p.sum(0), _plogp(p).sum()

    def by_split(values: Float64Array) -> Float64Array:
        """(G, ...) -> (R, splits, ...), summed over the groups of each split as often as they are drawn."""
        parts = [weights[:, split::splits] @ values[split::splits] for split in range(splits)]
        return np.stack(parts, 1)

    images = by_split(counts)
    entropies = by_split(certainty) / images - _plogp(by_split(sums) / images[..., None])
    return np.asarray(np.exp(entropies).mean(1))


def _plogp(p: Float64Array) -> Float64Array:
    """sum_k p log p over the last axis, with 0 log 0 = 0."""
    return np.asarray((p * np.log(np.where(p > 0, p, 1.0))).sum(-1))
