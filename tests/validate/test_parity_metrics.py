"""The metrics on arrays made by hand: what each one counts, and what it must not let through."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddexport.recipe import Limits
from ddexport.validate.metrics import embeddings, images, tokens
from ddexport.validate.metrics._base import (
    Drawn,
    DrawnPair,
    ImagePair,
    StepOutput,
    StepPair,
    relative_error,
)

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
            assert ("1 more excused" in found.note) is bool(excused)

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

    @given(st.integers(0, 2**32 - 1), st.floats(1e-3, 5.0), st.floats(1e-3, 5.0))
    def test_a_looser_limit_never_finds_more_faults(self, seed, limit, other):
        """And whatever differs is either a fault or excused."""
        generator = np.random.default_rng(seed)
        both = pair(generator.normal(size=(3, 4, 5)), generator.normal(size=(3, 4, 5)))
        tight, loose = (tokens.differing_tokens(both, each) for each in sorted((limit, other)))
        assert loose.value <= tight.value
        for found in (tight, loose):
            assert found.value + found.counts["excused"] == found.counts["differing"]


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

    @given(st.floats(0.01, 100.0), st.floats(1e-6, 1.0), st.integers(0, 2**32 - 1))
    def test_relative_error_is_free_of_scale_and_grows_with_the_error(self, scale, size, seed):
        generator = np.random.default_rng(seed)
        expected, error = generator.normal(size=(2, 3, 4, 2))
        everything = np.ones((3, 4), bool)
        value, row = relative_error(expected, expected + size * error, everything)
        scaled, _ = relative_error(scale * expected, scale * (expected + size * error), everything)
        double, _ = relative_error(expected, expected + 2 * size * error, everything)
        assert scaled == pytest.approx(value, rel=1e-6)
        assert double == pytest.approx(2 * value, rel=1e-6)
        assert 0 <= row < 3

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

    def test_one_wrong_pixel_passes_the_ratio_and_fails_the_largest_difference(self):
        """Why both are measured."""
        expected = np.full((1, 3, 256, 256), 0.4, np.float32)
        got = expected.copy()
        got[0, 0, 3, 4] += 0.2
        limits = Limits(1e-3, 1e-4, image_psnr=60.0, image_max=2)
        ratio, largest = images.measure(image_pair(expected, got), limits)
        assert ratio.passed
        assert (largest.value, largest.passed) == (51.0, False)

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
