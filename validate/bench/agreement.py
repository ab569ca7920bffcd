"""Is what was timed right? The outputs of the timed runs against the float32 PyTorch modules'.

Both sides sampled end to end by themselves. A step is held to the limits for those images whose tokens agreed
in all steps before, because the others had another input; a teacher for the AR steps up to the first one in
which an image's token differs. The measures are those of `validate parity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddexport.runtime.bundle import TEACHER, Manifest, Schedule
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.teacher import sampling_of
from ddexport.validate import limits
from ddexport.validate.bench.workload import Inputs, Outputs
from ddexport.validate.compare import measure
from ddexport.validate.metrics._base import (
    BoolArray,
    Comparison,
    FloatArray,
    ImagePair,
    Limits,
    StudentOutput,
    StudentPair,
    TeacherPair,
)
from ddexport.validate.report import failure_line

NO_LIMITS = Limits(math.inf, math.inf, -math.inf, 1 << 30)
FIGURES = {  # by field of `Agreement`: the measurement's name, and which of several is the worst
    "embedding_error": ("embeddings, relative error", max),
    "image_psnr": ("image PSNR, dB", min),
    "image_max": ("image, largest 8-bit difference", max),
}


@dataclass(frozen=True)
class Agreement:
    """Parity of one row. passed: None where there is nothing to hold it against.

    tokens_equal: the share of all tokens. embedding_error: rms error / rms of the worst image and step.
    image_psnr: dB, infinite if equal. image_max: the largest 8-bit difference. faults: what is past its
    limit. notes: what the figures leave out.
    """

    tokens_equal: float | None = None
    embedding_error: float | None = None
    image_psnr: float | None = None
    image_max: float | None = None
    passed: bool | None = None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def limits_of(manifest: Manifest, precision: str) -> Limits | None:
    """The manifest's limits of a precision; None if it states none, or not all."""
    try:
        stated = limits.limits_of(manifest, precision, complete=False)
    except VerificationError:
        return None
    # One image has too few tokens for a share of them, or a histogram, to mean anything.
    return replace(stated, tokens_differing=None, histogram_bias=None)


@dataclass(frozen=True)
class Judge:
    """Holds the outputs of one workload against the reference's."""

    manifest: Manifest
    schedule: Schedule
    inputs: Inputs
    expected: Outputs

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(f"image {i} (label {label})" for i, label in enumerate(self.inputs.labels))

    def comparable(self, got: Outputs) -> BoolArray:
        """(B,): the images whose tokens all agree, so that their pictures can be compared."""
        return self._agreeing(got, len(got.steps))

    def fits(self, got: Outputs) -> bool:
        """Whether the outputs have the shapes of the reference's."""
        return _shapes(got) == _shapes(self.expected)

    def judge(self, got: Outputs, precision: str, decoded: FloatArray | None = None) -> Agreement:
        """Parity of one run. decoded: the image of the reference's sequence, where none is comparable."""
        allowed = limits_of(self.manifest, precision)
        if not self.fits(got):
            return Agreement(passed=False, faults=("the outputs have other shapes than the reference's",))
        agree, image = self.comparable(got), got.image
        if decoded is not None:
            agree, image = np.ones_like(agree), decoded
        pair = ImagePair("image", self.expected.image, image, agree, self.places)
        comparison = Comparison(self._students(got), [pair], self._teachers(got))
        measurements = measure(comparison, allowed or NO_LIMITS)
        differing, compared = self._tokens(got)
        faults = tuple(failure_line(measurement) for measurement in measurements if not measurement.passed)
        notes = list(self._notes(got, decoded, differing, compared))
        if allowed is None:
            notes.append(f"the bundle states no limits for {precision}")
        worst = {
            field: worst_value([m.value for m in measurements if m.name == name], pick)
            for field, (name, pick) in FIGURES.items()
        }
        return Agreement(
            tokens_equal=1.0 - differing / compared if compared else None,
            **worst,
            passed=None if allowed is None else not faults,
            faults=faults,
            notes=tuple(notes),
        )

    def _agreeing(self, got: Outputs, steps: int) -> BoolArray:
        agree = np.ones(len(self.inputs.labels), dtype=np.bool_)
        for own, other in list(zip(self.expected.steps, got.steps, strict=True))[:steps]:
            agree &= (own.tokens == other.tokens).all(axis=1)
        return agree

    def _students(self, got: Outputs) -> list[StudentPair]:
        pairs, places = [], np.array(self.places)
        numbers = [number for number, step in enumerate(got.steps) if step.role == "student"]
        for index, (number, known) in enumerate(zip(numbers, self.schedule.known, strict=True)):
            rows = np.flatnonzero(self._agreeing(got, number))
            if not len(rows):
                continue
            expected, own = (
                StudentOutput(outputs.steps[number].sequence, outputs.logits[index]).rows(rows)
                for outputs in (self.expected, got)
            )
            counts, split = np.full(len(rows), known, dtype=np.int64), expected.logits.shape[1]
            names = tuple(places[rows].tolist())
            pairs.append(StudentPair(f"step {number + 1}", expected, own, counts, split, names))
        return pairs

    def _teachers(self, got: Outputs) -> list[TeacherPair]:
        """A pair an image: how many of its AR steps had the same input is its own."""
        span, teacher = self.schedule.teacher, self.manifest.teacher
        sampling = sampling_of(self.schedule, teacher, {})
        if span is None or teacher is None or self.expected.guided is None or got.guided is None:
            return []
        assert sampling is not None  # the schedule has a teacher
        number = [step.role for step in got.steps].index(TEACHER)
        differs = self.expected.steps[number].tokens != got.steps[number].tokens
        pairs = []
        for row in np.flatnonzero(self._agreeing(got, number)):
            first = int(differs[row].argmax()) if differs[row].any() else span.end - 1
            end = next(after for start, after in teacher.steps(span) if start <= first < after)
            same, image = slice(0, end - span.start), slice(row, row + 1)
            pairs.append(
                TeacherPair(
                    TEACHER,
                    self.expected.guided[image, same],
                    got.guided[image, same],
                    span.start,
                    self.inputs.uniforms[image, span.start : end],
                    sampling,
                    self.places[image],
                    itself=True,  # leaves out the law of many samples, which takes seconds
                )
            )
        return pairs

    def _tokens(self, got: Outputs) -> tuple[int, int]:
        """How many tokens that a step decided differ, and of how many."""
        differing = compared = 0
        known, span = iter(self.schedule.known), self.schedule.teacher
        for own, other in zip(self.expected.steps, got.steps, strict=True):
            first = next(known) if own.role == "student" else span.start if span else 0
            differing += int((own.tokens[:, first:] != other.tokens[:, first:]).sum())
            compared += own.tokens[:, first:].size
        return differing, compared

    def _notes(
        self, got: Outputs, decoded: FloatArray | None, differing: int, compared: int
    ) -> Iterable[str]:
        if differing:
            yield f"{differing} of {compared} tokens differ"
        left_out = int((~self.comparable(got)).sum())
        if decoded is not None:
            yield "the image is that of the reference's sequence: a token differs in every image"
        elif left_out:
            yield f"{left_out} of {len(self.inputs.labels)} images are left out: a token differs"


def worst_of(agreements: Sequence[Agreement]) -> Agreement:
    """All runs of a row in one: the worst of each figure, and the faults of all."""
    verdicts = [agreement.passed for agreement in agreements]
    picks = {"tokens_equal": min, **{field: pick for field, (_, pick) in FIGURES.items()}}
    worst = {
        field: worst_value([getattr(agreement, field) for agreement in agreements], pick)
        for field, pick in picks.items()
    }
    return Agreement(
        **worst,
        passed=None if None in verdicts else all(verdicts),
        faults=tuple(dict.fromkeys(fault for agreement in agreements for fault in agreement.faults)),
        notes=tuple(dict.fromkeys(note for agreement in agreements for note in agreement.notes)),
    )


def worst_value(values: Iterable[float | None], pick: Callable[..., float | None]) -> float | None:
    """The worst of those that are there; NaN where one is NaN; None without one."""
    known = [value for value in values if value is not None]
    return math.nan if any(map(math.isnan, known)) else pick(known, default=None)


def _shapes(outputs: Outputs) -> list[tuple[int, ...]]:
    of_steps = [array.shape for step in outputs.steps for array in (step.tokens, step.sequence)]
    return [*of_steps, *(logits.shape for logits in outputs.logits), outputs.image.shape]
