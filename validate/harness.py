"""Runs a bundle and its reference on the same labels and noise, and lines the outputs up for the metrics.

Three kinds of comparison, because each shows what the others hide:

- Every step on the same input: both sides are given the tokens that the reference kept, so that one flipped
  token in step 1 cannot make all of step 2 look wrong. This is what is held to the limits.
- End to end, each side keeping its own tokens, as a user gets it. Differing tokens are information here; the
  images whose tokens all agree are held to the limits.
- The bundle against itself in other batches (`validate.batches`).

Everything here is numpy: what the two sides are made of is not this module's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.errors import VerificationError
from runtime.registry import load_plugin, plugins
from validate.batches import Batch, Model, against_itself, decode, mix, rows_against_itself, run_student
from validate.metrics._base import (
    Compare,
    Comparison,
    FloatArray,
    ImagePair,
    IntArray,
    Limits,
    Measurement,
    StudentOutput,
    StudentPair,
)

REFERENCE_BATCH = 1  # the least memory, and no row of the reference can depend on another


@dataclass(frozen=True)
class Request:
    """Labels (N,) int64, noise (N, L, Cv) float32, steps -> known numbers, and the largest batch."""

    labels: IntArray
    noise: FloatArray
    schedules: dict[int, tuple[int, ...]]
    split: int
    batch: int

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Each distinct step by the `known` numbers up to it: schedules share their first steps."""
        found = [known[: k + 1] for _, known in sorted(self.schedules.items()) for k in range(len(known))]
        return list(dict.fromkeys(found))

    @property
    def work(self) -> int:
        """About how many rows are run, of students and decoders together, for a progress bar."""
        compared = len(self.labels) * (2 * len(self.prefixes) + 3 * len(self.schedules))
        return compared + 2 * rows_against_itself(self.batch)

    @property
    def places(self) -> tuple[str, ...]:
        """The name of each image, for people."""
        return tuple(f"image {i} (label {label})" for i, label in enumerate(self.labels))


@dataclass(frozen=True)
class _Step:
    """One step of both sides: its input as the reference kept it, and what came out."""

    rows: Batch
    expected: StudentOutput
    got: StudentOutput  # the bundle on the same input
    own: StudentOutput  # the bundle on the tokens it kept itself


def compare(bundle: Model, reference: Model, request: Request) -> Comparison:
    """Runs everything. Raises `VerificationError` where the outputs cannot even be lined up."""
    steps = _run_steps(bundle, reference, request)
    students = [
        StudentPair(
            _prefix_name(prefix), step.expected, step.got, step.rows.known, request.split, request.places
        )
        for prefix, step in steps.items()
    ]
    images: list[ImagePair] = []
    for count, known in sorted(request.schedules.items()):
        path = [steps[known[: k + 1]] for k in range(len(known))]
        pair = _end_to_end_pair(count, known, path, request)
        students.append(pair)
        images += _image_pairs(bundle, reference, pair, count, request)
    every = list(steps.values())
    rows, alone = mix([step.rows for step in every], [step.got for step in every], request.batch)
    own_students, own_images = against_itself(bundle, rows, alone, request.split)
    return Comparison(students + own_students, images + own_images)


def measure(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """What every parity metric says, gathered by scope in the order in which the scopes were run."""
    scopes = comparison.scopes()
    found = [one for metric in _parity_metrics() for one in metric(comparison, limits)]
    return sorted(found, key=lambda one: scopes.index(one.scope))


def _parity_metrics() -> Iterable[Compare]:
    """The metric files that compare a bundle with its reference; the others serve other commands."""
    for name in plugins("validate.metrics"):
        function = getattr(load_plugin("validate.metrics", name), "compare", None)
        if function is not None:
            yield function


def _run_steps(bundle: Model, reference: Model, request: Request) -> dict[tuple[int, ...], _Step]:
    done: dict[tuple[int, ...], _Step] = {}
    for prefix in request.prefixes:
        done[prefix] = _run_step(bundle, reference, request, prefix[-1], done.get(prefix[:-1]))
    return done


def _run_step(bundle: Model, reference: Model, request: Request, known: int, before: _Step | None) -> _Step:
    tokens = own_tokens = request.noise
    if before is not None:
        tokens = np.concatenate([before.expected.sequence[:, :known], request.noise[:, known:]], axis=1)
        own_tokens = np.concatenate([before.own.sequence[:, :known], request.noise[:, known:]], axis=1)
    counts = np.full(len(request.labels), known, dtype=np.int64)
    rows = Batch(tokens, request.labels, counts, request.places)
    expected = run_student(reference, rows, REFERENCE_BATCH)
    got = run_student(bundle, rows, request.batch)
    _check_shapes("sequence", expected.sequence, got.sequence)
    _check_shapes("logits", expected.logits, got.logits)
    if np.array_equal(tokens, own_tokens):
        return _Step(rows, expected, got, own=got)
    own = run_student(bundle, Batch(own_tokens, request.labels, counts, request.places), request.batch)
    return _Step(rows, expected, got, own)


def _check_shapes(name: str, expected: FloatArray, got: FloatArray) -> None:
    if expected.shape != got.shape:
        raise VerificationError(
            f"the bundle's {name} has shape {got.shape}, the reference's {expected.shape}",
            "the graphs and the recipe of this bundle disagree: export it again",
        )


def _prefix_name(prefix: tuple[int, ...]) -> str:
    return f"step {len(prefix)} (known {', '.join(map(str, prefix))})"


def _schedule_name(count: int, what: str) -> str:
    return f"{count} step{'s' if count > 1 else ''}, {what}"


def _end_to_end_pair(count: int, known: tuple[int, ...], path: list[_Step], request: Request) -> StudentPair:
    """The final sequences, and for each position the logits of the step that had the last word on it."""
    sides = []
    for outputs in ([step.expected for step in path], [step.own for step in path]):
        logits = outputs[0].logits.copy()
        for first, output in zip(known, outputs, strict=True):
            logits[:, first:] = output.logits[:, first:]
        sides.append(StudentOutput(outputs[-1].sequence, logits))
    return StudentPair(
        scope=_schedule_name(count, "end to end"),
        expected=sides[0],
        got=sides[1],
        known=np.zeros_like(request.labels),
        split=request.split,
        places=request.places,
        gate=False,
    )


def _image_pairs(
    bundle: Model, reference: Model, pair: StudentPair, count: int, request: Request
) -> tuple[ImagePair, ImagePair]:
    """Both decoders on the reference's sequence, then the bundle's on its own sequence."""
    expected = decode(reference, pair.expected.sequence, REFERENCE_BATCH)
    same = decode(bundle, pair.expected.sequence, request.batch)
    _check_shapes("image", expected, same)
    own = decode(bundle, pair.got.sequence, request.batch)
    agree = np.logical_not(pair.differing().any(axis=1))
    scope = _schedule_name(count, "decoder on the same sequence")
    return (
        ImagePair(scope, expected, same, np.ones_like(agree), request.places),
        ImagePair(pair.scope, expected, own, agree, request.places),
    )
