"""What the sampler promises whatever the student: original noise, kept positions, tokens that fit them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ddexport.runtime.sampler import sample
from ddexport.runtime.schedule import Schedule


class FakeStudent:
    """Depends on every input, remembers what it was given, and keeps the contract of the graph."""

    def __init__(self, split: int, codebook: int, width: int) -> None:
        rng = np.random.default_rng(0)
        self.split = split
        self.weight = rng.standard_normal((width, codebook)).astype(np.float32)
        self.codebook = rng.standard_normal((codebook, width)).astype(np.float32)
        self.feeds: list[dict[str, Any]] = []

    def __call__(self, feeds: Any) -> dict[str, Any]:
        self.feeds.append({name: array.copy() for name, array in feeds.items()})
        latents, known = feeds["latents"], feeds["known"][:, None, None]
        logits = np.sin(latents[:, : self.split] @ self.weight + feeds["label"][:, None, None] + known)
        fresh, tokens = np.tanh(latents + known + latents.mean(axis=1, keepdims=True)), logits.argmax(-1)
        fresh[:, : self.split] = self.codebook[tokens]
        is_known = np.arange(latents.shape[1])[None, :, None] < known
        tokens.flags.writeable = False  # as an engine may hand them out
        return {"sequence": np.where(is_known, latents, fresh).astype(np.float32), "tokens": tokens}


@st.composite
def cases(draw: DrawFn) -> tuple[FakeStudent, np.ndarray, np.ndarray, Schedule]:
    length, width, batch = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    split = draw(st.integers(1, length))
    later = draw(st.sets(st.integers(1, length - 1), max_size=3)) if length > 1 else set()
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    noise = rng.standard_normal((batch, length, width)).astype(np.float32)
    labels = rng.integers(0, 10, batch)
    return FakeStudent(split, 6, width), noise, labels, Schedule(known=(0, *sorted(later)))


@given(cases())
def test_kept_positions_stay_and_the_rest_is_the_original_noise(case: Any) -> None:
    """In every step; a kept position reports the token that it got."""
    student, noise, labels, schedule = case
    before, began = noise.copy(), time.perf_counter()
    steps = sample(student, noise, {"label": labels}, schedule)
    np.testing.assert_array_equal(noise, before)  # the caller's noise is not written to
    assert len(student.feeds) == len(steps) == len(schedule.known)
    assert {step.role for step in steps} == {"student"}
    assert 0 < sum(step.seconds for step in steps) < time.perf_counter() - began
    for number, (known, feeds) in enumerate(zip(schedule.known, student.feeds, strict=True)):
        np.testing.assert_array_equal(feeds["label"], labels)
        assert feeds["known"].tolist() == [known] * len(labels)
        assert feeds["known"].dtype == np.int64
        np.testing.assert_array_equal(feeds["latents"][:, known:], noise[:, known:])
        if number:
            np.testing.assert_array_equal(feeds["latents"][:, :known], steps[number - 1].sequence[:, :known])
    for step in steps:
        assert step.tokens.dtype == np.int64
        assert step.tokens.shape == (len(labels), student.split)
        # A position before the split is the codebook entry of its token, in whatever step it was decided.
        np.testing.assert_array_equal(step.sequence[:, : student.split], student.codebook[step.tokens])
    for known, earlier, later in zip(schedule.known[1:], steps, steps[1:], strict=False):
        np.testing.assert_array_equal(later.sequence[:, :known], earlier.sequence[:, :known])
        np.testing.assert_array_equal(later.tokens[:, :known], earlier.tokens[:, :known])


@given(cases(), st.randoms(use_true_random=False))
def test_images_do_not_see_each_other(case: Any, random: Any) -> None:
    """Permuting the batch permutes the result; a part of the batch gives a part of the result."""
    student, noise, labels, schedule = case
    order = list(range(len(labels)))
    random.shuffle(order)
    whole = sample(student, noise, {"label": labels}, schedule)
    moved = sample(student, noise[order], {"label": labels[order]}, schedule)
    first = sample(student, noise[:1], {"label": labels[:1]}, schedule)
    for step, other, one in zip(whole, moved, first, strict=True):
        np.testing.assert_array_equal(other.tokens, step.tokens[order])
        np.testing.assert_allclose(other.sequence, step.sequence[order], rtol=1e-6)
        np.testing.assert_array_equal(one.tokens, step.tokens[:1])
