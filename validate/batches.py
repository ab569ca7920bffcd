"""Batches of student rows, and a bundle against itself: no row may depend on its neighbours in the batch.

Rows of different steps are mixed in one batch, as the graphs allow. Then identical rows must agree,
permuting the batch must permute the result, and every batch size must say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from validate.metrics._base import FloatArray, ImagePair, IntArray, StudentOutput, StudentPair

SMALL_SIZES = (1, 2, 3)


class Model(Protocol):
    """One side of a comparison: a bundle or a reference."""

    def student(self, tokens: FloatArray, label: IntArray, known: IntArray) -> StudentOutput:
        """tokens (B, L, Cv) float32, label (B,), known (B,) int64, as the graph takes them."""

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (B, L, Cv) float32 -> images (B, 3, H, W) float32 in [0, 1]."""


@dataclass(frozen=True)
class Batch:
    """Rows for the student: tokens (N, L, Cv) float32, labels (N,), known (N,) int64, and a name of each."""

    tokens: FloatArray
    labels: IntArray
    known: IntArray
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: IntArray) -> Batch:
        """The rows `index` names, in its order."""
        places = tuple(self.places[i] for i in index)
        return Batch(self.tokens[index], self.labels[index], self.known[index], places)

    @staticmethod
    def concatenate(parts: Sequence[Batch]) -> Batch:
        """The rows of all parts, in order."""
        return Batch(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.known for part in parts]),
            tuple(place for part in parts for place in part.places),
        )


def run_student(model: Model, rows: Batch, batch: int) -> StudentOutput:
    """The student on all rows, at most `batch` at once."""
    return StudentOutput.concatenate(
        [
            model.student(rows.tokens[i : i + batch], rows.labels[i : i + batch], rows.known[i : i + batch])
            for i in range(0, len(rows), batch)
        ]
    )


def decode(model: Model, sequence: FloatArray, batch: int) -> FloatArray:
    """The images of all sequences (N, L, Cv), at most `batch` at once."""
    parts = [model.decode(sequence[i : i + batch]) for i in range(0, len(sequence), batch)]
    return np.concatenate(parts)


def mix(steps: Sequence[Batch], outputs: Sequence[StudentOutput], size: int) -> tuple[Batch, StudentOutput]:
    """`size` rows that alternate between the steps, and what each gave among rows of its own step.

    Repeats from the first row on where there are too few.
    """
    picks = [(i % len(steps), np.array([i // len(steps) % len(steps[0])])) for i in range(size)]
    rows = Batch.concatenate([steps[step].rows(row) for step, row in picks])
    places = tuple(f"{place}, known {known}" for place, known in zip(rows.places, rows.known, strict=True))
    named = Batch(rows.tokens, rows.labels, rows.known, places)
    return named, StudentOutput.concatenate([outputs[step].rows(row) for step, row in picks])


def rows_against_itself(size: int) -> int:
    """How many rows `against_itself` runs for a batch of `size`."""
    return 3 * size + sum(n for n in SMALL_SIZES if n < size)


def against_itself(
    bundle: Model, rows: Batch, alone: StudentOutput, split: int
) -> tuple[list[StudentPair], list[ImagePair]]:
    """Compares one batch with itself repeated, permuted and cut up; `alone` holds its rows run step by step.

    Its size is the largest batch size that is tried.
    """
    size = len(rows)
    whole = _draw(bundle, rows)
    trials = []
    repeated = _draw(bundle, rows.rows(np.zeros(size, dtype=np.int64)))
    first = repeated.take(np.zeros(size, dtype=np.int64))
    trials.append(_Trial("identical rows", first, repeated))
    backwards = np.arange(size)[::-1]
    trials.append(_Trial("permuted batch", whole.take(backwards), _draw(bundle, rows.rows(backwards))))
    # From the end of the whole, so that no row keeps its neighbours or its place.
    small = [np.arange(size - n, size) for n in SMALL_SIZES if n < size]
    cut = _Drawn.concatenate([_draw(bundle, rows.rows(index)) for index in small])
    name = f"batch sizes {', '.join(str(len(index)) for index in small)}, {size}"
    trials.append(_Trial(name, whole.take(np.concatenate(small)), cut))

    mixed = StudentPair(
        "steps mixed in a batch", alone, whole.output, rows.known, split, rows.places, itself=True
    )
    return [mixed, *(trial.students(split) for trial in trials)], [trial.pictures(split) for trial in trials]


@dataclass(frozen=True)
class _Drawn:
    """Rows that were run through both graphs in one batch."""

    rows: Batch
    output: StudentOutput
    images: FloatArray

    def take(self, index: IntArray) -> _Drawn:
        return _Drawn(self.rows.rows(index), self.output.rows(index), self.images[index])

    @staticmethod
    def concatenate(parts: Sequence[_Drawn]) -> _Drawn:
        return _Drawn(
            Batch.concatenate([part.rows for part in parts]),
            StudentOutput.concatenate([part.output for part in parts]),
            np.concatenate([part.images for part in parts]),
        )


@dataclass(frozen=True)
class _Trial:
    """The same rows in two different batches."""

    scope: str
    expected: _Drawn
    got: _Drawn

    def students(self, split: int) -> StudentPair:
        rows = self.got.rows
        expected, got = self.expected.output, self.got.output
        return StudentPair(self.scope, expected, got, rows.known, split, rows.places, itself=True)

    def pictures(self, split: int) -> ImagePair:
        # The decoder is fed what the student gave, so a token that flips by rounding changes the picture too.
        agree = np.logical_not(self.students(split).differing().any(axis=1))
        return ImagePair(
            self.scope, self.expected.images, self.got.images, agree, self.got.rows.places, itself=True
        )


def _draw(bundle: Model, rows: Batch) -> _Drawn:
    size = len(rows)
    places = tuple(f"batch of {size}, row {i}: {place}" for i, place in enumerate(rows.places))
    output = bundle.student(rows.tokens, rows.labels, rows.known)
    named = Batch(rows.tokens, rows.labels, rows.known, places)
    return _Drawn(named, output, bundle.decode(output.sequence))
