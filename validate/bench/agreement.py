"""Is what was timed right? Each step of the last timed run, and its image, against what the float32 PyTorch
modules give on the same input: the measures and limits of `validate parity`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ddexport.runtime.bundle import Manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.teacher import choose, sampling_of
from ddexport.validate.bench.plan import Entry
from ddexport.validate.bench.session import Inputs, Outputs
from ddexport.validate.compare import measure
from ddexport.validate.limits import limits_of
from ddexport.validate.metrics._base import (
    Comparison,
    FloatArray,
    ImagePair,
    Limits,
    StudentPair,
    TeacherPair,
)

NO_LIMITS = Limits(math.inf, math.inf, -math.inf, 1 << 30)


def agreement(
    manifest: Manifest, entry: Entry, inputs: Inputs, got: Outputs, expected: Outputs
) -> dict[str, Any]:
    """The fields of a row that tell of parity.

    tokens_equal: share of the tokens decided. embedding_error: rms error / rms of the worst image and step.
    image_psnr: dB, of the worst 8-bit image; infinite if equal. image_max: the largest 8-bit difference.
    passed: None where the bundle states no limits for the precision. faults: what is past its limit.
    """
    precision = entry.configuration.precision
    try:
        # One image has too few tokens for a share of them, or a histogram, to mean anything.
        stated = limits_of(manifest, precision, complete=False)
        limits = replace(stated, tokens_differing=None, histogram_bias=None)
    except VerificationError:
        limits = NO_LIMITS
    schedule, places = manifest.schedule(entry.steps), tuple(f"image {i}" for i in range(entry.batch))
    split, students, teachers = schedule.split or manifest.sequence.split, [], []
    for number, known in enumerate(schedule.known):
        pair = expected.students[number], got.students[number]
        counts = np.full(entry.batch, known, dtype=np.int64)
        students.append(StudentPair(f"student step {number + 1}", *pair, counts, split, places))
    equal = [(~pair.differing())[pair.decided()] for pair in students]
    sampling, span = sampling_of(schedule, manifest.teacher, {}), schedule.teacher
    if sampling is not None and span is not None:
        assert expected.guided is not None and got.guided is not None
        numbers = inputs.uniforms[:, span.start : span.end]
        both = expected.guided, got.guided
        # `itself` leaves out the law of many draws, which takes seconds.
        teachers.append(TeacherPair("teacher", *both, span.start, numbers, sampling, places, itself=True))
        drawn = next(step.tokens for step in got.steps if step.role == "teacher")[:, span.start :]
        equal.append((choose(expected.guided, numbers, sampling) == drawn).ravel())
    everything = np.ones(entry.batch, dtype=np.bool_)
    images = ImagePair("image", _floats(expected), _floats(got), everything, places, pixels=True)
    measurements = measure(Comparison(students, [images], teachers), limits)
    faults = [str(one) for one in measurements if not one.passed]

    def worst(name: str) -> float | None:
        """NaN where one is; None without one."""
        values = [
            one.value if one.direction == "at most" else -one.value
            for one in measurements
            if name in one.name
        ]
        return float(np.abs(np.max(values))) if values else None

    return {
        "tokens_equal": float(np.concatenate(equal).mean()),
        "embedding_error": worst("embeddings, relative error"),
        "image_psnr": worst("image PSNR"),
        "image_max": worst("largest 8-bit difference"),
        "passed": None if limits is NO_LIMITS else not faults,
        "faults": "; ".join(faults),
        "notes": f"the bundle states no limits for {precision}" if limits is NO_LIMITS else "",
    }


def _floats(outputs: Outputs) -> FloatArray:
    """The 8-bit images as (B, 3, H, W) in [0, 1]."""
    return outputs.pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
