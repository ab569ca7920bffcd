"""What a distribution is off by as a whole: faults that no single logit or token shows. Part of `tokens`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddexport.validate.metrics._base import BoolArray, FloatArray, Limits, Measurement


def distribution(
    scope: str, expected: FloatArray, got: FloatArray, decided: BoolArray, limits: Limits
) -> list[Measurement]:
    """Errors that are small in every logit and still not rounding: logits (N, S, V), decided (N, S)."""
    if not decided.any():
        return []
    expected, got = expected[decided], got[decided]  # (R, V)
    differing = expected.argmax(-1) != got.argmax(-1)
    bias = 0.5 * float(np.abs(_probabilities(got).mean(0) - _probabilities(expected).mean(0)).sum())
    note = f"{int(differing.sum())} of {len(differing)}"
    rms = float(np.sqrt(np.square(got.astype(np.float64) - expected).mean()))
    return [
        Measurement(
            "tokens", scope, "share of tokens that differ", float(differing.mean()), limits.tokens_differing,
            note=note, rule="tokens_differing",
        ),
        Measurement("tokens", scope, "logits, rms error", rms, limits.logits_rms, rule="logits_rms"),
        Measurement(
            "tokens", scope, "token histogram, bias", bias, limits.histogram_bias, rule="histogram_bias"
        ),
    ]  # fmt: skip


def _probabilities(logits: FloatArray) -> npt.NDArray[np.float64]:
    """softmax (..., V), in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))
