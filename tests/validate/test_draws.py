"""What a teacher draws: which other tokens rounding excuses, and the law of many draws."""

from __future__ import annotations

import dataclasses

import numpy as np

from ddexport.recipe import Limits
from ddexport.runtime.teacher import Sampling, choose
from ddexport.validate.metrics._base import Comparison, StepOutput, StepPair
from ddexport.validate.metrics._draws import chi_square, deviations, excused_draws
from ddexport.validate.metrics.tokens import compare

LIMITS = Limits(token_margin=1e-3, embedding_error=1e-4, image_psnr=60.0, image_max=2)
SAMPLING = Sampling(guidance_scale=1.0, top_k=6, top_p=0.95, temperature=1.0)


def pair_of(expected: np.ndarray, got: np.ndarray, numbers: np.ndarray, sampling: Sampling) -> StepPair:
    places = tuple(f"image {i}" for i in range(len(expected)))
    known = np.zeros(len(expected), np.int64)
    sides = StepOutput(expected), StepOutput(got)
    return StepPair("here", *sides, known, places, sampling=sampling, uniforms=numbers)


def test_rounding_is_excused_where_a_number_lies_on_a_step() -> None:
    """40,000 draws from logits that differ by less than the limit: some differ, all of them are excused."""
    rng = np.random.default_rng(2)
    for sampling in (SAMPLING, Sampling(guidance_scale=1.0, top_k=20, top_p=1.0, temperature=0.7)):
        expected = rng.standard_normal((40, 1000, 20)).astype(np.float32)
        got = (expected + rng.uniform(-1e-3, 1e-3, expected.shape)).astype(np.float32)
        differing, pardoned = excused_draws(pair_of(expected, got, rng.random((40, 1000)), sampling), 1e-3)
        assert 3 <= differing.sum() <= 200
        np.testing.assert_array_equal(differing, pardoned)


def test_another_distribution_is_not_excused() -> None:
    """Logits that differ by more than the limit give tokens that no rounding explains."""
    rng = np.random.default_rng(3)
    expected = rng.standard_normal((10, 500, 20)).astype(np.float32)
    got = (expected + 0.1 * rng.standard_normal(expected.shape)).astype(np.float32)
    differing, pardoned = excused_draws(pair_of(expected, got, rng.random((10, 500)), SAMPLING), 1e-3)
    assert differing.sum() > 100
    assert pardoned.sum() < 0.1 * differing.sum()


def test_a_token_at_the_threshold_may_come_or_go_but_no_other() -> None:
    """Two logits on both sides of the k-th place, closer than rounding, may change places."""
    top = Sampling(guidance_scale=1.0, top_k=2, top_p=1.0, temperature=1.0)
    for gap, excused in ((5e-4, True), (5e-2, False)):
        expected = np.array([[[1.0, 0.5, 0.5 + gap, -3.0]]], np.float32)
        got = np.array([[[1.0, 0.5 + gap, 0.5, -3.0]]], np.float32)
        numbers = np.array([[0.9]])
        assert choose(expected, numbers, top) != choose(got, numbers, top)
        _, pardoned = excused_draws(pair_of(expected, got, numbers, top), 1e-3)
        assert bool(pardoned[0, 0]) is excused


def test_the_law_of_the_draws_is_checked_by_its_chi_square() -> None:
    """The same probabilities lie within 4 deviations; a temperature 10 % off does not."""
    logits = (2 * np.random.default_rng(4).standard_normal((200, 50))).astype(np.float32)
    same = deviations(*chi_square(logits, logits, SAMPLING, 64))
    assert abs(same) < 4
    hotter = deviations(*chi_square(logits / np.float32(1.3), logits, SAMPLING, 64))
    assert hotter > 5


def test_a_sure_token_leaves_nothing_to_test() -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[:, 2] = 100
    assert chi_square(logits, logits, SAMPLING, 64) == (0.0, 0)
    assert deviations(0.0, 0) == 0.0


def test_greedy_has_no_draws_to_compare() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    greedy = dataclasses.replace(SAMPLING, top_k=1)
    pair = pair_of(logits, logits, np.zeros((2, 3)), greedy)
    names = [one.name for one in compare(Comparison([pair]), LIMITS)]
    assert set(names) >= {"guided logits, largest error", "tokens that differ, largest"}
    assert not any("drawn" in name or "chi-square" in name for name in names)
