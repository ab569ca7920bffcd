"""What was timed is judged: faults are seen where they are, and excused only where rounding may be why."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
from msgspec import structs

from ddexport.runtime.bundle import read_manifest
from ddexport.validate.bench.agreement import Agreement, Judge, limits_of, worst_of
from ddexport.validate.bench.worker import Session
from ddexport.validate.bench.workload import REFERENCE, Job, RunnerConfiguration, Workload, inputs_of


@pytest.fixture(scope="module")
def manifest(bundle):
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def judge_of(bundle, manifest):
    @cache
    def judge(steps, batch=3):
        session = Session()
        session.open(Job(bundle, RunnerConfiguration(REFERENCE, "fp32", 1)))
        expected = session.run(Workload(batch, steps), True).outputs
        return Judge(manifest, manifest.schedule(steps), inputs_of(manifest, batch, 0), expected)

    return judge


def with_tokens(outputs, number, tokens):
    """The same outputs with other tokens in a step."""
    steps = list(outputs.steps)
    steps[number] = dataclasses.replace(steps[number], tokens=tokens)
    return dataclasses.replace(outputs, steps=steps)


def changed(outputs, step=0, sequence=0.0, logits=0.0, image=0.0):
    """The same outputs with everything of one kind moved."""
    steps, of_student = list(outputs.steps), list(outputs.logits)
    steps[step] = dataclasses.replace(steps[step], sequence=steps[step].sequence + np.float32(sequence))
    of_student[step] = of_student[step] + np.float32(logits)
    return dataclasses.replace(
        outputs, steps=steps, logits=of_student, image=outputs.image + np.float32(image)
    )


@pytest.mark.parametrize("steps", [1, 2, "teacher"])
def test_the_reference_agrees_with_itself(steps, judge_of):
    judge = judge_of(steps)
    found = judge.judge(judge.expected, "fp32")
    assert found.passed is True and not found.faults and not found.notes
    assert (found.tokens_equal, found.image_psnr, found.image_max) == (1.0, math.inf, 0.0)
    assert found.embedding_error == (None if steps == "teacher" else 0.0)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"sequence": 0.1}, "embeddings"),
        ({"logits": 0.1}, "logits"),
        ({"image": 0.1}, "image PSNR"),
        ({"image": np.nan}, "image"),
        ({"step": 1, "sequence": 0.1}, "step 2"),
    ],
)
def test_a_fault_is_seen_where_it_is(fault, said, judge_of):
    judge = judge_of(2)
    found = judge.judge(changed(judge.expected, **fault), "fp32")
    assert found.passed is False
    assert any(said in text for text in found.faults)


def other_token(outputs, row, margin):
    """One image's first token is another one, which the reference's logits put `margin` below the largest."""
    expected, got = outputs.logits[0].copy(), outputs.logits[0].copy()
    order = expected[row, 0].argsort()
    got[row, 0, order[-2]] = expected[row, 0, order[-1]] + 1e-6
    expected[row, 0, order[-2]] = expected[row, 0, order[-1]] - margin
    tokens = outputs.steps[0].tokens.copy()
    tokens[row, 0] = order[-2]
    theirs = dataclasses.replace(with_tokens(outputs, 0, tokens), logits=[got])
    return dataclasses.replace(outputs, logits=[expected]), theirs


@pytest.mark.parametrize(("margin", "passed"), [(5e-4, True), (5e-2, False)])
def test_a_differing_token_is_excused_only_by_a_close_call(margin, passed, judge_of):
    """And its image, which shows something else, is left out of the pictures that are compared."""
    judge = judge_of(1)
    expected, got = other_token(judge.expected, 1, margin)
    picture = got.image.copy()
    picture[1] = 1.0 - picture[1]
    judge = dataclasses.replace(judge, expected=expected)
    found = judge.judge(dataclasses.replace(got, image=picture), "fp32")
    assert found.passed is passed
    assert found.tokens_equal == pytest.approx(2 / 3)
    assert found.image_max == 0.0
    assert "1 of 3 images are left out: a token differs" in found.notes


def test_where_no_image_can_be_compared_the_decoder_is_compared_alone(judge_of):
    judge = judge_of(1, batch=1)
    expected, got = other_token(judge.expected, 0, 5e-4)
    judge = dataclasses.replace(judge, expected=expected)
    assert not judge.comparable(got).any()
    found = judge.judge(got, "fp32", decoded=expected.image + np.float32(0.2))
    assert found.passed is False and found.image_psnr == pytest.approx(14.0, abs=0.1)


def test_a_teacher_is_held_to_its_logits_up_to_the_first_token_that_differs(judge_of, manifest):
    """What comes after another token was drawn from other inputs; what comes before may not differ."""
    judge = judge_of("teacher", batch=1)
    tokens = judge.expected.steps[0].tokens.copy()
    tokens[0, 1:] = (tokens[0, 1:] + 1) % 16
    guided = judge.expected.guided.copy()
    guided[0, 0] += 0.1 * np.arange(16, dtype=np.float32)
    found = judge.judge(dataclasses.replace(judge.expected, guided=guided), "fp32")
    assert found.passed is False and any("guided logits" in text for text in found.faults)
    # The second AR step is compared, because the first one's tokens agree.
    later = with_tokens(judge.expected, 0, tokens)
    found = judge.judge(later, "fp32", decoded=judge.expected.image)
    assert found.tokens_equal == pytest.approx(1 / 5)
    assert found.embedding_error is None


def test_without_limits_there_is_no_verdict(judge_of):
    judge = judge_of(1)
    found = judge.judge(changed(judge.expected, sequence=0.1), "int8")
    assert found.passed is None and found.embedding_error > 0
    assert "the bundle states no limits for int8" in found.notes


def test_other_shapes_are_a_fault(judge_of):
    judge = judge_of(1)
    smaller = dataclasses.replace(judge.expected, image=judge.expected.image[..., :2])
    assert not judge.fits(smaller)
    assert judge.judge(smaller, "fp32").passed is False


def test_limits_that_are_not_whole_are_none(manifest):
    parity = {"fp32": {"token_margin": 1.0}, "bf16": "much"}
    assert limits_of(structs.replace(manifest, parity=parity), "fp32") is None
    assert limits_of(structs.replace(manifest, parity=parity), "bf16") is None
    assert limits_of(manifest, "fp32").image_max == 2


def test_the_worst_run_of_a_row_counts():
    """An engine that is wrong now and then is wrong."""
    right = Agreement(1.0, 1e-6, 120.0, 0.0, True)
    wrong = Agreement(0.5, 1e-2, 20.0, 9.0, False, ("far off",))
    found = worst_of([right, wrong, right])
    assert found == Agreement(0.5, 1e-2, 20.0, 9.0, False, ("far off",))
    assert math.isnan(worst_of([right, dataclasses.replace(wrong, image_psnr=math.nan)]).image_psnr)
    assert worst_of([right, dataclasses.replace(right, passed=None)]).passed is None


def test_equal_outputs_have_one_digest(judge_of):
    for steps in (2, "teacher"):
        outputs = judge_of(steps).expected
        assert dataclasses.replace(outputs, image=outputs.image.copy()).digest() == outputs.digest()
        assert dataclasses.replace(outputs, image=outputs.image * 2).digest() != outputs.digest()
    assert changed(judge_of(2).expected, step=1, sequence=1e-6).digest() != judge_of(2).expected.digest()
