"""Inception Score (Salimans et al., arXiv 1606.03498): exp of the mean KL divergence of p(y|x) from p(y).

It is the published score where the probabilities are those of Inception's 1008 logits without their bias;
with another classifier it is the same measure on another scale, at most the number of its classes. Two sums
over the images determine it, so that probabilities need not be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.validate.statistics import TooFewSamples

Float64Array: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

SPLITS = 10
GROUPS = 200


@dataclass(frozen=True)
class Score:
    """Mean of the score over the splits, and their standard deviation, which is what is usually published.

    The deviation is that of one split, not an error of the mean.
    """

    mean: float
    deviation: float


class ScoreSums:
    """What a score needs of a stream of probabilities, in groups by image index: how many images, the sum of
    p (K,), and the sum of sum_k p log p.
    """

    def __init__(self, classes: int, groups: int = GROUPS) -> None:
        """Of no images yet."""
        self.counts: Float64Array = np.zeros(groups)
        self.sums: Float64Array = np.zeros((groups, classes))
        self.certainty: Float64Array = np.zeros(groups)

    @property
    def count(self) -> int:
        """N."""
        return int(self.counts.sum())

    def update(self, probabilities: npt.NDArray[np.floating[Any]], indices: npt.ArrayLike) -> None:
        """Adds probabilities (n, K) of the images numbered `indices` (n,). Raises ValueError for what are no
        probabilities.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] != self.sums.shape[1]:
            raise ValueError(f"probabilities must be (n, {self.sums.shape[1]}), but are {p.shape}")
        if not (p >= 0).all() or not np.allclose(p.sum(1), 1, atol=1e-3):
            raise ValueError("probabilities must be at least 0 and sum to 1")
        p = p / p.sum(1, keepdims=True)  # float32 softmax sums to 1 within 1e-6 only
        group = np.asarray(indices, dtype=np.int64) % len(self.counts)
        np.add.at(self.counts, group, 1.0)
        np.add.at(self.sums, group, p)
        np.add.at(self.certainty, group, _plogp(p))

    def score(self, splits: int = SPLITS) -> Score:
        """Split s is the images whose index is s modulo `splits`, which must divide the groups.

        Raises TooFewSamples if a split has no image.
        """
        values = self._split_scores(splits)
        return Score(float(values.mean()), float(values.std()))

    def _split_scores(self, splits: int) -> Float64Array:
        if splits < 1 or len(self.counts) % splits:
            raise ValueError(f"{splits} splits do not divide {len(self.counts)} groups")

        def by_split(values: Float64Array) -> Float64Array:
            return np.asarray(values.reshape(-1, splits, *values.shape[1:]).sum(0))

        counts = by_split(self.counts)
        if (counts == 0).any():
            raise TooFewSamples(
                f"{self.count} images do not fill {splits} splits of the Inception Score",
                "Draw more images, or ask for fewer splits.",
            )
        marginal = by_split(self.sums) / counts[:, None]
        return np.asarray(np.exp(by_split(self.certainty) / counts - _plogp(marginal)))

    def to_arrays(self) -> Arrays:
        """Everything, to go on from: counts (G,), sums (G, K), certainty (G,)."""
        return {"counts": self.counts, "sums": self.sums, "certainty": self.certainty}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> ScoreSums:
        """What `to_arrays` gave. Raises ValueError for shapes that do not fit, KeyError for a missing one."""
        counts, sums, certainty = (arrays[name] for name in ("counts", "sums", "certainty"))
        if sums.ndim != 2 or not counts.shape == certainty.shape == sums.shape[:1]:
            raise ValueError(f"counts {counts.shape}, sums {sums.shape}, certainty {certainty.shape}")
        result = ScoreSums(sums.shape[1], len(counts))
        result.counts, result.sums, result.certainty = (
            array.astype(np.float64) for array in (counts, sums, certainty)
        )
        return result


def inception_score(probabilities: npt.NDArray[np.floating[Any]], splits: int = SPLITS) -> Score:
    """Of probabilities (N, K), N >= splits: image i is in split i modulo `splits`."""
    sums = ScoreSums(probabilities.shape[1], splits)
    sums.update(probabilities, np.arange(len(probabilities)))
    return sums.score(splits)


def _plogp(p: Float64Array) -> Float64Array:
    """sum_k p log p over the last axis, with 0 log 0 = 0."""
    return np.asarray((p * np.log(np.where(p > 0, p, 1.0))).sum(-1))
