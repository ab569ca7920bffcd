"""The measures of parity on arrays made by hand: what each one counts, and what it must not let through."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddexport.recipe import Limits
from ddexport.runtime.teacher import Sampling
from ddexport.validate.metrics import embeddings, images, tokens
from ddexport.validate.metrics._base import (
    Comparison,
    Drawn,
    DrawnPair,
    ImagePair,
    StepOutput,
    StepPair,
    relative_error,
)
from ddexport.validate.metrics._draws import chi_square, deviations, excused_draws
from ddexport.validate.metrics.tokens import compare

BELOW = np.nextafter(np.float32(0.25), np.float32(0))


def pair(expected, got, *, known=0, sequences=None) -> StepPair:
    """Logits (N, S, V) of both sides; sequences of zeros unless given."""
    expected, got = np.asarray(expected, np.float32), np.asarray(got, np.float32)
    zeros = np.zeros((len(expected), expected.shape[1] + 2, 2), np.float32)
    first, second = sequences or (zeros, zeros)
    places = tuple(f"image {i}" for i in range(len(expected)))
    sides = StepOutput(expected, first), StepOutput(got, second)
    return StepPair("step 1", *sides, np.full(len(expected), known, np.int64), places)


def image_pair(expected, got, comparable=None) -> ImagePair:
    size = len(expected)
    comparable = np.ones(size, bool) if comparable is None else np.array(comparable)
    return ImagePair("1 step", expected, got, comparable, tuple(f"image {i}" for i in range(size)))


class TestTokens:
    def test_a_flip_is_excused_only_below_the_limit(self):
        for reference, got, value, excused in (
            ([0.0, -BELOW, -3.0], [0.0, 1.0, -3.0], 0.0, 1),
            ([0.0, -0.25, -3.0], [0.0, 1.0, -3.0], 1.0, 0),
            ([0.0, -0.26, -3.0], [0.0, 1.0, -3.0], 1.0, 0),
            ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], 1.0, 0),  # a third token, which neither of the close two was
        ):
            found = tokens.differing_tokens(pair([[reference]], [[got]]), limit=0.25)
            assert (found.value, found.counts["excused"], found.passed) == (value, excused, not value)
            assert ("1 more differ in a near tie" in found.note) is bool(excused)

    def test_kept_positions_are_not_compared(self):
        """Their logits are not used; only the second position is decided here."""
        both = pair([[[9.0, 0.0], [9.0, 0.0]]], [[[0.0, 9.0], [9.0, 0.0]]], known=1)
        found = tokens.differing_tokens(both, limit=0.25)
        assert found.passed and found.counts["compared"] == 1

    def test_the_worst_place_is_named(self):
        """The flip with the largest margin, or logits that are no numbers."""
        reference = [[[1.0, 0.5]], [[3.0, 0.5]], [[9.0, 0.0]]]
        found = tokens.differing_tokens(pair(reference, [[[0, 1]], [[0, 1]], [[1, 0]]]), limit=0.25)
        assert found.value == 2.0
        assert found.where == "image 1, position 0, margin 2.5: largest 1 for 0"
        found = tokens.logits_error(pair([[[1.0, 0.0]]], [[[1.0, math.nan]]]), limit=0.25)
        assert (found.passed, found.where) == (False, "image 0, position 0")

    def test_end_to_end_tokens_are_information_and_images_left_out_are_not(self, limits: Limits):
        numbers, zeros = np.array([[1, 2], [3, 4]]), np.zeros((2, 1, 1), np.float32)
        pixels = np.zeros((2, 4, 4, 3), np.uint8)
        got = np.array([[1, 2], [3, 5]])
        sides = (Drawn(tokens, zeros, pixels) for tokens in (numbers, got))
        drawn = DrawnPair("1 step", *sides, ("a", "b"))
        differing = tokens.drawn_tokens(drawn)
        assert (differing.value, differing.gated) == (1.0, False)
        left_out = images.left_out(drawn, limits)
        assert (left_out.value, left_out.limit, left_out.passed) == (0.5, 0.1, False)
        by_teacher = images.left_out(dataclasses.replace(drawn, by_teacher=True), limits)
        assert (by_teacher.rule, by_teacher.gated) == ("drawn_left_out", False)

    def test_a_bias_shows_in_the_histogram_and_rounding_does_not(self, limits: Limits):
        """Against the total variation distance by hand; noise of the same size averages out."""
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(50, 8, 16)).astype(np.float32)
        favoured = logits + np.float32(0.5) * (np.arange(16) % 8 == 0)
        noisy = logits + rng.normal(0, 0.17, logits.shape).astype(np.float32)
        rows = {}
        for name, got in (("bias", favoured), ("noise", noisy)):
            rows[name] = {one.rule: one for one in tokens.distribution(pair(logits, got), limits)}
        means = [
            (np.exp(one) / np.exp(one).sum(-1, keepdims=True)).mean((0, 1)) for one in (logits, favoured)
        ]
        by_hand = abs(means[0] - means[1]).sum() / 2
        assert rows["bias"]["histogram_bias"].value == pytest.approx(by_hand, rel=1e-5)
        assert rows["bias"]["logits_rms"].value == pytest.approx(0.5 * (2 / 16) ** 0.5, rel=1e-5)
        assert rows["noise"]["histogram_bias"].value < by_hand / 5
        share = (logits.argmax(-1) != favoured.argmax(-1)).mean()
        assert rows["bias"]["tokens_differing"].value == share > 0


class TestEmbeddings:
    def sequences(self, change: float = 0.0, row: int = 0, position: int = 3):
        generator = np.random.default_rng(1)
        expected = generator.normal(size=(20, 4, 2)).astype(np.float32)
        got = expected.copy()
        got[row, position] += np.float32(change)
        return expected, got

    def both(self, **options):
        logits = np.zeros((20, 2, 3), np.float32)
        return pair(logits, logits, sequences=self.sequences(**options))

    def test_one_bad_image_is_not_hidden_by_the_good_ones(self):
        alone = embeddings.regressed(self.both(change=1.0, row=7), 1e-4)[0]
        expected, got = self.sequences(change=1.0, row=7)
        by_hand = math.sqrt(
            np.square(got[7, 2:] - expected[7, 2:]).mean() / np.square(expected[7, 2:]).mean()
        )
        assert alone.value == pytest.approx(by_hand, rel=1e-5)
        assert alone.where == "image 7, position 3"
        assert not alone.passed

    def test_copied_positions_are_compared_alone(self):
        both = self.both(change=0.1, row=4, position=1)  # before the split
        found = embeddings.copied(both, 1e-4)
        assert (found.passed, found.where) == (False, "image 4, position 1")
        assert embeddings.regressed(both, 1e-4)[0].value == 0.0
        logits = np.zeros((20, 2, 3), np.float32)  # behind the split, but kept
        both = pair(logits, logits, known=4, sequences=self.sequences(change=0.1, row=3, position=3))
        assert not embeddings.copied(both, 1e-4).passed
        assert embeddings.regressed(both, 1e-4)[0].value == 0.0
        flipped = logits.copy()  # another token has another codebook entry: no error of the copying
        flipped[0, 1, 2] = 1.0
        sequences = self.sequences(change=5.0, row=0, position=1)
        assert embeddings.copied(pair(logits, flipped, sequences=sequences), 1e-4).value == 0.0

    def test_not_a_number_fails_and_is_the_worst(self):
        found = embeddings.regressed(self.both(change=math.nan, row=5), 1e-4)
        assert not found[0].passed
        assert {one.where for one in found} == {"image 5, position 3"}

    def test_an_error_on_a_reference_of_zeros_is_infinite(self):
        zeros = np.zeros((1, 2, 2), np.float32)
        everything = np.ones((1, 2), bool)
        assert relative_error(zeros, zeros + 1, everything) == (math.inf, 0)
        assert relative_error(zeros, zeros, everything) == (0.0, 0)


class TestImages:
    grey = np.full((3, 3, 4, 4), 0.5, np.float32)

    @given(st.floats(1e-4, 0.4))
    def test_psnr_of_a_constant_error_is_minus_twenty_decades(self, error):
        got = (self.grey.astype(np.float64) + error).astype(np.float64)
        assert images.psnr(self.grey, got) == pytest.approx(-20 * math.log10(error), abs=1e-6)

    def test_the_worst_image_is_named_and_images_of_other_tokens_are_left_out(self, limits: Limits):
        def measured(comparable=None, **changes: float):
            got = self.grey.copy()
            for name, change in changes.items():
                got[int(name[1:]), 0] += change
            return images.measure(image_pair(self.grey, got, comparable), limits)

        assert [one.value for one in measured()] == [math.inf, 0.0]
        for changes, where in (({"i1": 0.01, "i2": 0.1}, "image 2"), ({"i1": math.nan}, "image 1")):
            assert [(one.passed, one.where) for one in measured(**changes)] == [(False, where)] * 2
        found = measured([False, True, True], i0=-0.5)
        assert all(one.passed and one.counts == {"compared": 2, "left_out": 1} for one in found)
        # Nothing comparable is information and not a pass.
        assert [one.gated for one in measured([False] * 3)] == [False, False]


LIMIT = 0.1  # of a logit's error


def test_the_images_measure_is_that_of_the_worst_one():
    """Errors of 0.01, 0.1 and 0.001: 40, 20 and 60 dB."""
    expected = np.full((3, 3, 4, 4), 0.5)
    got = expected + np.array([0.01, 0.1, 0.001])[:, None, None, None]
    pair = ImagePair("1 step", expected, got, np.ones(3, bool), ("a", "b", "c"))
    ratio, largest = images.measure(pair, Limits(1e-3, 1e-4, image_psnr=30.0, image_max=25))
    assert (ratio.value, ratio.where, ratio.passed) == (pytest.approx(20.0), "b", False)
    assert (largest.value, largest.where, largest.passed) == (25.0, "b", True)  # 153 for 128


def excused(expected, got, number, *, top_k=9, temperature=1.0):
    """Whether it is, for one position whose tokens differ."""
    sampling = Sampling(guidance_scale=1.0, top_k=top_k, top_p=1.0, temperature=temperature)
    sides = (StepOutput(np.array([[side]], np.float64)) for side in (expected, got))
    pair = StepPair(
        "teacher", *sides, np.zeros(1, np.int64), ("a",), sampling=sampling, uniforms=np.array([[number]])
    )
    differing, pardoned = excused_draws(pair, LIMIT)
    assert differing.tolist() == [[True]]
    return bool(pardoned[0, 0])


def test_a_number_is_excused_within_a_quarter_of_the_factor():
    """Two equal logits share at 1/2; the other side draws the token on the other side of it."""
    for temperature, side, share in itertools.product((0.5, 1.0, 2.0), (1, -1), (0.999, 1.001)):
        width = (math.exp(2 * LIMIT / temperature) - 1) / 4
        other, number = ([9, 0] if side > 0 else [0, 9]), 0.5 + side * share * width
        assert excused([0, 0], other, number, temperature=temperature) is (share < 1)


def test_a_token_crosses_the_threshold_within_twice_the_limit():
    """The best two: the other side has the third for the second. The number is the second's own.
    And the other way round."""
    for beyond, wanted in ((0.199, True), (0.201, False)):
        assert excused([3, 0, -beyond, -9], [3, -1, 0, -9], 0.99, top_k=2) is wanted
        assert excused([3, -beyond, 0, -9], [3, 0, -1, -9], 0.99, top_k=2) is wanted


def test_what_crossed_the_threshold_widens_the_excuse_by_its_mass():
    """The best three: the last two have changed places, and each counts with its share where it has one."""
    lost, won = math.exp(-3) / (2 + math.exp(-3)), math.exp(-3) / (math.e + 1 + math.exp(-3))
    border = 1 / (2 + math.exp(-3))  # between the first two
    width = (math.exp(2 * LIMIT) - 1) / 4 + lost + won
    for share, wanted in ((0.999, True), (1.001, False)):
        number = border + share * width
        assert excused([0, 0, -3, -3.1], [1, 0, -3.1, -3], number, top_k=3) is wanted


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
