"""Is what was timed right? The outputs of the timed runs against the float32 PyTorch modules'.

Both sides drew end to end by themselves. A step is held to the limits for those images whose tokens agreed in
all steps before, because the others had another input; a teacher for the AR steps up to the first one in
which an image's token differs. The measures are those of `validate parity`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.manifest import Manifest, Schedule
from ddexport.runtime.teacher import Sampling, choice_of
from ddexport.validate import limits
from ddexport.validate.bench.case import Inputs
from ddexport.validate.bench.outputs import Outputs
from ddexport.validate.compare import measure
from ddexport.validate.metrics._base import (
    BoolArray,
    Comparison,
    FloatArray,
    ImagePair,
    IntArray,
    Limits,
    Measurement,
    StudentPair,
    TeacherPair,
)
from ddexport.validate.report import failure_line

NO_LIMITS = Limits(math.inf, math.inf, -math.inf, 1 << 30)


@dataclass(frozen=True)
class Agreement:
    """Parity of one row. passed: None where there is nothing to hold it against.

    tokens_equal: the share of all drawn tokens. embedding_error: rms error / rms of the worst image and step.
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
    """Holds the outputs of one case against the reference's, which lie in `file`."""

    manifest: Manifest
    schedule: Schedule
    given: Inputs
    expected: Outputs
    file: Path

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(f"image {i} (label {label})" for i, label in enumerate(self.given.labels))

    def comparable(self, got: Outputs) -> BoolArray:
        """(B,): the images whose tokens all agree, so that their pictures can be compared."""
        return self._agreeing(got, len(got.tokens))

    def fits(self, got: Outputs) -> bool:
        """Whether the outputs have the shapes of the reference's."""
        return [one.shape for one in _every(self.expected)] == [one.shape for one in _every(got)]

    def judge(self, got: Outputs, precision: str, decoded: FloatArray | None = None) -> Agreement:
        """Parity of one run. decoded: the image of the reference's sequence, where none is comparable."""
        allowed = limits_of(self.manifest, precision)
        if not self.fits(got):
            return Agreement(passed=False, faults=("the outputs have other shapes than the reference's",))
        comparison = Comparison(self._students(got), [self._images(got, decoded)], self._teachers(got))
        found = measure(comparison, allowed or NO_LIMITS)
        differing, compared = self._tokens(got)
        faults = tuple(failure_line(one) for one in found if not one.passed)
        notes = list(self._notes(got, decoded, differing, compared))
        if allowed is None:
            notes.append(f"the bundle states no limits for {precision}")
        return Agreement(
            tokens_equal=1.0 - differing / compared if compared else None,
            embedding_error=_worst(found, "embeddings, relative error", max),
            image_psnr=_worst(found, "image PSNR, dB", min),
            image_max=_worst(found, "image, largest 8-bit difference", max),
            passed=None if allowed is None else not faults,
            faults=faults,
            notes=tuple(notes),
        )

    def _agreeing(self, got: Outputs, steps: int) -> BoolArray:
        agree = np.ones(len(self.given.labels), dtype=np.bool_)
        for one, other in zip(self.expected.tokens[:steps], got.tokens[:steps], strict=True):
            agree &= (one == other).all(axis=1)
        return agree

    def _roles(self) -> list[str]:
        """What each step is, in the order of `ddexport.runtime.sampler`."""
        teacher = ["teacher"] if self.schedule.teacher else []
        return ["student"] * len(self.schedule.before) + teacher + ["student"] * len(self.schedule.after)

    def _students(self, got: Outputs) -> list[StudentPair]:
        pairs, places = [], np.array(self.places)
        numbers = [number for number, role in enumerate(self._roles()) if role == "student"]
        for pass_, (number, known) in enumerate(zip(numbers, self.schedule.known, strict=True)):
            rows = np.flatnonzero(self._agreeing(got, number))
            if not len(rows):
                continue
            expected, own = self.expected.students[pass_].rows(rows), got.students[pass_].rows(rows)
            counts = np.full(len(rows), known, dtype=np.int64)
            names = tuple(places[rows].tolist())
            split = expected.logits.shape[1]
            pairs.append(StudentPair(f"step {number + 1}", expected, own, counts, split, names))
        return pairs

    def _teachers(self, got: Outputs) -> list[TeacherPair]:
        """A pair an image: how many of its AR steps had the same input is its own."""
        span, teacher = self.schedule.teacher, self.manifest.teacher
        if span is None or teacher is None or self.expected.guided is None or got.guided is None:
            return []
        choice = choice_of(self.schedule, teacher, Sampling())
        assert choice is not None  # the schedule has a teacher
        number = self._roles().index("teacher")
        pairs = []
        for row in np.flatnonzero(self._agreeing(got, number)):
            differing = np.flatnonzero(self.expected.tokens[number][row] != got.tokens[number][row])
            first = int(differing[0]) if len(differing) else span.end - 1
            end = next(after for start, after in teacher.steps(span) if start <= first < after)
            same, one = slice(0, end - span.start), slice(row, row + 1)
            pairs.append(
                TeacherPair(
                    "teacher",
                    self.expected.guided[one, same],
                    got.guided[one, same],
                    span.start,
                    self.given.uniforms[one, span.start : end],
                    choice,
                    self.places[one],
                    itself=True,  # leaves out the law of many draws, which takes seconds
                )
            )
        return pairs

    def _images(self, got: Outputs, decoded: FloatArray | None) -> ImagePair:
        agree = self.comparable(got)
        if decoded is not None:
            return ImagePair("image", self.expected.image, decoded, np.ones_like(agree), self.places)
        return ImagePair("image", self.expected.image, got.image, agree, self.places)

    def _tokens(self, got: Outputs) -> tuple[int, int]:
        """How many tokens that a step decided differ, and of how many."""
        differing = compared = 0
        student = iter(self.schedule.known)
        pairs = zip(self._roles(), self.expected.tokens, got.tokens, strict=True)
        for role, one, other in pairs:
            first = next(student) if role == "student" else getattr(self.schedule.teacher, "start", 0)
            differing += int((one[:, first:] != other[:, first:]).sum())
            compared += one[:, first:].size
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
            yield f"{left_out} of {len(self.given.labels)} images are left out: a token differs"


def worst_of(found: Sequence[Agreement]) -> Agreement:
    """All runs of a row in one: the worst of each figure, and the faults of all."""
    assert found
    verdicts = [one.passed for one in found]

    def worst(name: str, pick: Any) -> float | None:
        values = [getattr(one, name) for one in found if getattr(one, name) is not None]
        return math.nan if any(map(math.isnan, values)) else pick(values, default=None)

    return Agreement(
        worst("tokens_equal", min),
        worst("embedding_error", max),
        worst("image_psnr", min),
        worst("image_max", max),
        None if None in verdicts else all(verdicts),
        tuple(dict.fromkeys(fault for one in found for fault in one.faults)),
        tuple(dict.fromkeys(note for one in found for note in one.notes)),
    )


def _worst(found: Sequence[Measurement], name: str, pick: Any) -> float | None:
    """The worst value of the measurements of that name; NaN where one is NaN; None without one."""
    values = [one.value for one in found if one.name == name]
    return math.nan if any(map(math.isnan, values)) else pick(values, default=None)


def _every(outputs: Outputs) -> list[FloatArray | IntArray]:
    students = [array for one in outputs.students for array in (one.sequence, one.logits)]
    return [*outputs.tokens, *students, outputs.sequence, outputs.image]
