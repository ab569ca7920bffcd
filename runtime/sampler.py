"""The one sampler of every family: `known` positions are kept, the rest is the original noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Schedule

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Step:
    """What one student step gives: tokens (N, S) int64 before the split, sequence (N, L, Cv) float32."""

    tokens: NDArray[np.int64]
    sequence: NDArray[np.float32]


def sample(
    student: Callable[[Arrays], Arrays],
    noise: NDArray[np.float32],
    labels: NDArray[np.int64],
    schedule: Schedule,
) -> list[Step]:
    """Runs the student once for each step of the schedule.

    student: arrays tokens (N, L, Cv), label (N,), known (N,) -> arrays sequence (N, L, Cv), logits (N, S, V).
    noise: float32 (N, L, Cv). labels: int64 (N,). Returns one Step for each step, the last one is the result.

    A step after the first keeps the first `known` positions of the step before and has the *original* noise
    in the rest. A kept position was decided before: its token is the one reported then, as in the published
    code.
    """
    steps: list[Step] = []
    for known in schedule.known:
        tokens = noise
        if steps:
            tokens = np.concatenate([steps[-1].sequence[:, :known], noise[:, known:]], axis=1)
        outputs = student(
            {"tokens": tokens, "label": labels, "known": np.full(len(labels), known, dtype=np.int64)}
        )
        codes = outputs["logits"].argmax(axis=-1).astype(np.int64)
        if steps:
            codes[:, :known] = steps[-1].tokens[:, :known]
        steps.append(Step(codes, outputs["sequence"]))
    return steps
