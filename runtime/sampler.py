"""The one sampler of every family: `known` positions are kept, the rest is the original noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ddexport.runtime.manifest import Schedule, Span, Teacher
from ddexport.runtime.teacher import Pick, draw, nearest_codes
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]


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


@dataclass(frozen=True)
class TeacherRun:
    """What the steps of a teacher need: its graph, codebook (V, Cv), guidance, and who chooses the tokens."""

    run: Run
    teacher: Teacher
    codebook: NDArray[np.float32]
    cfg: float
    pick: Pick


def sample(
    student: Run,
    noise: NDArray[np.float32],
    labels: NDArray[np.int64],
    schedule: Schedule,
    teacher: TeacherRun | None = None,
    on_pass: Callable[[int], None] | None = None,
) -> list[Step]:
    """Runs the student once for each `known` of the schedule, and the teacher where the schedule has a span.

    student: arrays tokens (N, L, Cv), label (N,), known (N,) -> arrays sequence (N, L, Cv), logits (N, S, V).
    noise: float32 (N, L, Cv). labels: int64 (N,). teacher: for schedules with a span. on_pass: told N after
    each pass of either. Returns the steps in order, the last one is the result.

    A step after the first keeps the first `known` positions of the step before and has the *original* noise
    in the rest. A kept position was decided before: its token is the one reported then, as in the published
    code.
    """
    steps: list[Step] = []
    for known in schedule.before:
        steps.append(_student_step(student, noise, labels, known, steps, on_pass))
    if schedule.teacher is not None:
        assert teacher is not None  # the caller has one wherever the manifest has such a schedule
        steps.append(_teacher_step(teacher, noise, labels, schedule.teacher, steps, on_pass))
    for known in schedule.after:
        steps.append(_student_step(student, noise, labels, known, steps, on_pass))
    return steps


def _student_step(
    student: Run,
    noise: NDArray[np.float32],
    labels: NDArray[np.int64],
    known: int,
    steps: list[Step],
    on_pass: Callable[[int], None] | None,
) -> Step:
    began, tokens = time.perf_counter(), noise
    if steps:
        tokens = np.concatenate([steps[-1].sequence[:, :known], noise[:, known:]], axis=1)
    outputs = student(
        {"tokens": tokens, "label": labels, "known": np.full(len(labels), known, dtype=np.int64)}
    )
    codes = outputs["logits"].argmax(axis=-1).astype(np.int64)
    if steps:
        kept = min(known, codes.shape[1])  # a split may lie before what is known
        codes[:, :kept] = steps[-1].tokens[:, :kept]
    if on_pass is not None:
        on_pass(len(labels))
    return Step(codes, outputs["sequence"], seconds=time.perf_counter() - began)


def _teacher_step(
    teacher: TeacherRun,
    noise: NDArray[np.float32],
    labels: NDArray[np.int64],
    span: Span,
    steps: list[Step],
    on_pass: Callable[[int], None] | None,
) -> Step:
    began = time.perf_counter()
    prefix = _prefix(steps, len(labels), span, teacher.codebook)
    tokens = draw(teacher.run, teacher.teacher, span, prefix, labels, teacher.cfg, teacher.pick, on_pass)
    sequence = np.concatenate([teacher.codebook[tokens], noise[:, tokens.shape[1] :]], axis=1)
    return Step(tokens, sequence, "teacher", time.perf_counter() - began)


def _prefix(steps: list[Step], count: int, span: Span, codebook: NDArray[np.float32]) -> NDArray[np.int64]:
    """The tokens (N, start) that the student gives the teacher: behind its split the nearest entries."""
    if not steps:
        return np.zeros((count, 0), np.int64)
    own = steps[-1].tokens[:, : span.start]
    rest = steps[-1].sequence[:, own.shape[1] : span.start]
    return np.concatenate([own, nearest_codes(rest, codebook)], axis=1)
