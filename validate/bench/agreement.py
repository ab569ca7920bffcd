"""Is what was timed right? Each step of the last timed run, and its image, against what the float32 PyTorch
modules give on the same input: the measures and limits of `validate parity`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from msgspec.structs import replace

from ddexport.recipe import Limits
from ddexport.runtime.bundle import TEACHER, Manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.teacher import choose, sampling_of
from ddexport.validate.bench.plan import Entry
from ddexport.validate.bench.session import Inputs, Outputs
from ddexport.validate.compare import measure
from ddexport.validate.limits import limits_of
from ddexport.validate.metrics._base import Comparison, Drawn, ImagePair, StepPair

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
    schedule, places = manifest.schedule(entry.steps), [f"image {i}" for i in range(entry.batch)]
    sampling = sampling_of(schedule, manifest.teacher, {})
    known, span, pairs, equal = iter(schedule.known), schedule.teacher, [], []
    for number, (step, wanted, own) in enumerate(zip(got.steps, expected.outputs, got.outputs, strict=True)):
        more: dict[str, Any] = {}
        if step.role == TEACHER and span is not None and sampling is not None:
            numbers = inputs.uniforms[:, span.start : span.end]
            # `itself` leaves out the law of many draws, which takes seconds.
            more = {"itself": True, "start": span.start, "sampling": sampling, "uniforms": numbers}
            equal.append((choose(wanted.logits, numbers, sampling) == step.tokens[:, span.start :]).ravel())
        count = np.full(entry.batch, more["start"] if more else next(known), dtype=np.int64)
        pairs.append(StepPair(f"step {number + 1}", wanted, own, count, places, **more))
        if not more:
            equal.append(~pairs[-1].differing()[pairs[-1].decided()])
    last = got.steps[-1]
    images = [Drawn(last.tokens, last.sequence, side.pixels).image for side in (expected, got)]
    everything = np.ones(entry.batch, dtype=np.bool_)
    image = ImagePair("image", images[0], images[1], everything, places, pixels=True)
    measurements = measure(Comparison(pairs, [image]), limits)
    faults = [str(one) for one in measurements if not one.passed]

    def worst(name: str, pick: Any = np.max) -> float | None:
        """NaN where one is; None without one."""
        values = [one.value for one in measurements if name in one.name]
        return float(pick(values)) if values else None

    return {
        "tokens_equal": float(np.concatenate(equal).mean()),
        "embedding_error": worst("embeddings, relative error"),
        "image_psnr": worst("image PSNR", np.min),
        "image_max": worst("largest 8-bit difference"),
        "passed": None if limits is NO_LIMITS else not faults,
        "faults": "; ".join(faults),
        "notes": f"the bundle states no limits for {precision}" if limits is NO_LIMITS else "",
    }
