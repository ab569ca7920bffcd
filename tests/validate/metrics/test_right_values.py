"""Values and borders of the metrics, worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ddexport.recipe import Limits
from ddexport.runtime.teacher import Sampling
from ddexport.validate.metrics import images
from ddexport.validate.metrics._base import ImagePair, StepOutput, StepPair
from ddexport.validate.metrics._draws import excused_draws

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
