"""The one sampler of every family: `known` positions are kept, the rest is the original noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.schedule import Schedule, Span
from ddexport.runtime.teacher import Run, nearest_codes

Arrays = Mapping[str, NDArray[Any]]
# Tokens (N, start) of a prefix -> tokens (N, end) of a span behind it, from the teacher.
Generate = Callable[[Span, NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Step:
    """What a student step gives, or all AR steps of a teacher together.

    tokens: int64 (N, S) before the split, or (N, end) from a teacher, its prefix included. sequence: float32
    (N, L, Cv); from a teacher codebook entries, then the original noise. seconds: how long it took.
    """

    tokens: NDArray[np.int64]
    sequence: NDArray[np.float32]
    role: str = "student"
    seconds: float = 0.0


def sample(
    student: Run,
    noise: NDArray[np.float32],
    condition: Arrays,
    schedule: Schedule,
    generate: Generate | None = None,
    codebook: NDArray[np.float32] | None = None,
) -> list[Step]:
    """Runs the student once for each `known` of the schedule, and the teacher where the schedule has a span.

    student: arrays latents (N, L, Cv), known (N,), condition -> arrays sequence (N, L, Cv), tokens (N, S).
    noise: float32 (N, L, Cv). condition: its inputs that are the same in all steps, such as label (N,).
    generate, codebook (V, Cv): for schedules with a span.
    Returns the steps in order, the last one is the result.

    A step after the first keeps the first `known` positions of the step before and has the *original* noise
    in the rest.
    """
    steps: list[Step] = []
    span = schedule.teacher
    for known in schedule.known:
        if span is not None and known == span.end:
            steps.append(_teacher_step(generate, codebook, noise, span, steps))
        steps.append(_student_step(student, noise, condition, known, steps))
    if span is not None and span.end == noise.shape[1]:
        steps.append(_teacher_step(generate, codebook, noise, span, steps))
    return steps


def _student_step(
    student: Run, noise: NDArray[np.float32], condition: Arrays, known: int, steps: list[Step]
) -> Step:
    began, latents = time.perf_counter(), noise
    if steps:
        latents = np.concatenate([steps[-1].sequence[:, :known], noise[:, known:]], axis=1)
    outputs = student({"latents": latents, **condition, "known": np.full(len(noise), known, np.int64)})
    codes = np.array(outputs["tokens"])
    if steps:
        # What is kept was decided before: its token is the one reported then, as in the published code.
        kept = min(known, codes.shape[1])  # a split may lie before what is known
        codes[:, :kept] = steps[-1].tokens[:, :kept]
    return Step(codes, outputs["sequence"], seconds=time.perf_counter() - began)


def _teacher_step(
    generate: Generate | None,
    codebook: NDArray[np.float32] | None,
    noise: NDArray[np.float32],
    span: Span,
    steps: list[Step],
) -> Step:
    assert generate is not None and codebook is not None  # every manifest with such a schedule has them
    began = time.perf_counter()
    prefix = np.zeros((len(noise), 0), np.int64)
    if steps:  # behind the student's split the nearest codebook entries
        prefix = steps[-1].tokens[:, : span.start]
        rest = steps[-1].sequence[:, prefix.shape[1] : span.start]
        prefix = np.concatenate([prefix, nearest_codes(rest, codebook)], axis=1)
    tokens = generate(span, prefix)
    sequence = np.concatenate([codebook[tokens], noise[:, tokens.shape[1] :]], axis=1)
    return Step(tokens, sequence, "teacher", time.perf_counter() - began)
