"""The outputs of timed runs are compared: a fault is reported in its row, and only rounding is accepted."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
from msgspec import structs

from ddexport.runtime.backends import CPU, Configuration, choose
from ddexport.validate.bench.agreement import agreement
from ddexport.validate.bench.plan import Entry, missing_files
from ddexport.validate.bench.session import Job, Session, inputs_of
from ddexport.validate.bench.torch_engine import REFERENCE
from ddexport.validate.metrics._base import StepOutput
from tests.goldens import TEXT


@pytest.fixture(scope="module")
def reference(bundle):
    session = Session()
    session.open(Job(bundle, Configuration(REFERENCE, "cpu", "fp32", "fp32", CPU), 1))
    return session


@pytest.fixture(scope="module")
def drawn(reference):
    """drawn(steps): what the reference draws itself, as a row gives it, and what is expected of it."""

    @cache
    def outputs(steps):
        reference.run(3, steps)
        got = reference.outputs(3, steps)
        return got, reference.expected(3, steps, got.steps)

    return outputs


@pytest.fixture
def compared(manifest, entry_of):
    def compare(got, expected, steps=1, precision="fp32", manifest=manifest):
        entry = entry_of(3, steps, precision)
        return agreement(manifest, entry, inputs_of(manifest, 3, 0), got, expected)

    return compare


def test_the_reference_agrees_with_itself(drawn, compared):
    for steps in (1, 2, "teacher"):
        row = compared(*drawn(steps), steps)
        assert row["passed"] is True and not row["faults"] and not row["notes"], steps
        assert (row["tokens_equal"], row["image_psnr"], row["image_max"]) == (1.0, math.inf, 0.0)
        assert row["embedding_error"] == (None if steps == "teacher" else 0.0)


def changed(got, step=0, sequence=0.0, logits=0.0, pixels=0, guided=0.0):
    """The same outputs with everything of one kind moved."""
    outputs, own = list(got.outputs), got.outputs[step]
    if own.sequence is None:
        slope = np.arange(own.logits.shape[-1], dtype=np.float32)
        outputs[step] = StepOutput(own.logits + np.float32(guided) * slope)
    else:
        outputs[step] = StepOutput(own.logits + np.float32(logits), own.sequence + np.float32(sequence))
    return got._replace(outputs=outputs, pixels=got.pixels ^ np.uint8(pixels))


def test_a_fault_is_seen_where_it_is(drawn, compared):
    for steps, fault, name in (
        (2, {"sequence": 0.1}, "embeddings"),
        (2, {"sequence": np.nan}, "embeddings"),
        (2, {"step": 1, "sequence": 0.1}, "step 2"),
        (2, {"logits": 0.1}, "logits"),
        (2, {"pixels": 128}, "8-bit image PSNR"),
        (2, {"pixels": 8}, "largest 8-bit difference"),
        ("teacher", {"guided": 0.1}, "guided logits"),
    ):
        got, expected = drawn(steps)
        row = compared(changed(got, **fault), expected, steps)
        assert row["passed"] is False and name in row["faults"], fault


def with_another_token(pair, margin):
    """One image's first token is another one, which the reference's logits put `margin` below the largest."""
    got, expected = pair
    wanted, own = expected.outputs[0].logits.copy(), got.outputs[0].logits.copy()
    order = wanted[1, 0].argsort()
    own[1, 0, order[-2]] = wanted[1, 0, order[-1]] + 1e-6
    wanted[1, 0, order[-2]] = wanted[1, 0, order[-1]] - margin
    sides = ((got, own), (expected, wanted))
    return [side._replace(outputs=[dataclasses.replace(side.outputs[0], logits=new)]) for side, new in sides]


def test_a_differing_token_is_accepted_only_within_the_margin(drawn, compared):
    for margin, passed in ((3e-5, True), (5e-2, False)):
        row = compared(*with_another_token(drawn(1), margin))
        assert row["passed"] is passed and 0.9 < row["tokens_equal"] < 1.0


def test_a_teachers_token_that_its_logits_do_not_give_is_counted(drawn, compared, manifest):
    got, expected = drawn("teacher")
    tokens = got.steps[0].tokens.copy()
    tokens[0, 0] = (tokens[0, 0] + 1) % manifest.sequence.codebook
    other = [dataclasses.replace(got.steps[0], tokens=tokens)]
    assert compared(got._replace(steps=other), expected, "teacher")["tokens_equal"] < 1.0


def test_a_step_is_given_what_it_had(reference, drawn):
    """The second step's input is the first one's sequence and the original noise: as the sampler's own."""
    got, expected = drawn(2)
    for own, again in zip(got.outputs, expected.outputs, strict=True):
        np.testing.assert_array_equal(own.sequence, again.sequence)
    moved = [dataclasses.replace(got.steps[0], sequence=got.steps[0].sequence + 1), got.steps[1]]
    other = reference.expected(3, 2, moved)
    assert np.abs(other.outputs[1].sequence - expected.outputs[1].sequence).max() > 0.1
    # And what is compared is what was timed, not what the same input gives once more.
    timed = reference.results[3, 2, "full"]
    reference.results[3, 2, "full"] = dataclasses.replace(timed, steps=moved)
    np.testing.assert_array_equal(reference.outputs(3, 2).outputs[0].sequence, moved[0].sequence)
    reference.results[3, 2, "full"] = timed


def test_without_limits_there_is_no_verdict(drawn, compared, manifest):
    got, expected = drawn(1)
    for parity in ({}, {"fp32": {"token_margin": 1.0}}, {"fp32": "much"}):
        bare = structs.replace(manifest, parity=parity)
        row = compared(changed(got, sequence=0.1), expected, manifest=bare)
        assert row["passed"] is None and row["embedding_error"] > 0
        assert not row["faults"] and row["notes"]


def test_texts_are_drawn_by_every_engine_from_the_same_features(text_bundle):
    """PyTorch runs the collapsed text for a student, and the padded one for a teacher."""
    files, torch_session = dict(TEXT.files), Session()
    torch_session.open(Job(text_bundle, Configuration(REFERENCE, "cpu", "fp32", "fp32", CPU), 1, 0, files))
    manifest = torch_session.manifest
    assert not [*missing_files(manifest, files, True)]  # the text encoder is not timed
    for backend in ("onnxruntime", "openvino"):
        chosen = choose(text_bundle, manifest, backend, "fp32", "cpu")
        session = Session()
        session.open(Job(text_bundle, chosen, 1))
        for steps in (2, "teacher"):
            session.run(3, steps)
            got = session.outputs(3, steps)
            expected = torch_session.expected(3, steps, got.steps)
            row = agreement(manifest, Entry(chosen, 1, 3, steps), inputs_of(manifest, 3, 0), got, expected)
            assert row["passed"] and row["tokens_equal"] == 1.0, (backend, steps, row)
