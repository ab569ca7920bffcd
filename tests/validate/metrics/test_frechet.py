"""Frechet distance: closed forms, scipy's root, sets without full rank, intervals that hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from runtime.errors import DDError
from validate.metrics.frechet import (
    FrechetTo,
    frechet_difference,
    frechet_distance,
    frechet_figure,
    gaussian_fit,
)
from validate.statistics import Gaussian, GroupedMoments, TooFewSamples


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


def by_scipy(a, b):
    """The published way: the root of an unsymmetric product."""
    root = linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


def test_distance_of_a_set_to_itself_is_zero():
    statistics = gaussian_fit(gaussian(200))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_diagonal_gaussians_have_a_closed_form():
    a = Gaussian(np.array([1.0, 0.0]), np.diag([4.0, 1.0]))
    b = Gaussian(np.array([0.0, 2.0]), np.diag([9.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 3) ** 2 + (1 - 0.5) ** 2)


def test_commuting_covariances_are_rotation_invariant_and_symmetric():
    turn = np.linalg.qr(gaussian(5))[0]
    a = Gaussian(np.zeros(5), turn @ np.diag([1.0, 2, 3, 4, 5]) @ turn.T)
    b = Gaussian(np.ones(5), turn @ np.diag([5.0, 4, 3, 2, 1]) @ turn.T)
    expected = 5 + sum((np.sqrt(x) - np.sqrt(6 - x)) ** 2 for x in range(1, 6))
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_agrees_with_scipys_square_root_on_covariances_that_do_not_commute():
    a = gaussian_fit(gaussian(500, 40) @ gaussian(40, 40, seed=1))
    b = gaussian_fit(gaussian(500, 40, seed=2) @ gaussian(40, 40, seed=3) + 0.5)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_agrees_with_torchmetrics():
    """An implementation that shares no code with this one, through features that pass straight through."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Through(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x[:, :, 0, 0].double()

    measure = FrechetInceptionDistance(feature=Through(), normalize=True, input_img_size=(12, 1, 1))
    measure.set_dtype(torch.float64)
    a, b = gaussian(300, 12), gaussian(400, 12, seed=1) * 1.5 + 0.2
    for rows, real in ((a, True), (b, False)):
        measure.update(torch.from_numpy(rows)[:, :, None, None], real=real)
    expected = float(measure.compute())
    assert frechet_distance(gaussian_fit(a), gaussian_fit(b)) == pytest.approx(expected, rel=1e-6)


def test_rank_deficient_covariances_have_their_closed_form():
    """Variances of exactly zero: what rounding leaves of them must not enter through its square root."""
    turn = np.linalg.qr(gaussian(300, 300))[0]
    values_a = np.concatenate([np.linspace(1, 1000, 20), np.zeros(280)])
    values_b = np.concatenate([np.linspace(1000, 1, 15), np.zeros(285)])
    a = Gaussian(np.zeros(300), turn @ np.diag(values_a) @ turn.T)
    b = Gaussian(np.zeros(300), turn @ np.diag(values_b) @ turn.T)
    expected = ((np.sqrt(values_a) - np.sqrt(values_b)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_constant_features_are_no_obstacle():
    still = Gaussian(np.ones(3), np.zeros((3, 3)))
    assert frechet_distance(still, still) == 0
    assert frechet_distance(still, Gaussian(np.zeros(3), np.eye(3))) == pytest.approx(3 + 3)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_too_few_samples_are_an_error_that_says_how_many_are_needed(count):
    few, enough = gaussian_fit(gaussian(count, 10)), gaussian_fit(gaussian(11, 10))
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(TooFewSamples) as caught:
            frechet_distance(*pair)
        assert str(count) in caught.value.message and "11" in caught.value.hint
        assert frechet_distance(*pair, allow_few=True) > 0
    assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-9)


def test_statistics_of_unknown_count_are_taken_at_their_word():
    known = gaussian_fit(gaussian(50, 10))
    assert frechet_distance(known, Gaussian(known.mean, known.covariance)) == pytest.approx(0, abs=1e-9)


def test_numbers_that_are_not_finite_are_an_error_and_not_a_distance():
    good = gaussian_fit(gaussian(50))
    bad = Gaussian(np.full(5, np.nan), np.eye(5))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(DDError, match="not finite"):
            frechet_distance(*pair)


def test_the_rough_distance_is_the_distance_where_rank_is_full():
    a, b = gaussian_fit(gaussian(100)), gaussian_fit(gaussian(100, seed=1) + 1)
    to_b = FrechetTo(b)
    assert to_b.rough_distance(a) == pytest.approx(to_b.distance(a), rel=1e-9)


def grouped(rows, groups=20):
    result = GroupedMoments(rows.shape[1], groups)
    result.update(rows, np.arange(len(rows)))
    return result


def test_the_interval_covers_the_spread_of_repeated_draws():
    """95 % intervals of 60 sets against the mean over these: some must miss it, most must not."""
    reference = Gaussian(np.zeros(4), np.eye(4))
    figures = [
        frechet_figure(grouped(gaussian(400, 4, seed=s) * 1.3), reference, seed=s, resamples=100)
        for s in range(60)
    ]
    truth = np.mean([figure.value for figure in figures])
    held = np.mean([figure.low <= truth <= figure.high for figure in figures])
    assert 0.8 <= held < 1
    assert all(figure.low < figure.value < figure.high for figure in figures)


def test_the_bias_estimate_is_that_of_a_small_set():
    reference = Gaussian(np.zeros(6), np.eye(6))
    figures = [
        frechet_figure(grouped(gaussian(200, 6, seed=s), 50), reference, resamples=50) for s in range(10)
    ]
    biases, values = [f.bias for f in figures], [f.value for f in figures]
    assert np.mean(biases) == pytest.approx(np.mean(values), rel=0.4)  # the true distance is 0: all is bias


def test_the_difference_of_paired_sets_is_known_far_better_than_either():
    reference = Gaussian(np.zeros(4), np.eye(4))
    rows = gaussian(1000, 4) * 1.2
    near = grouped(rows + 1e-4 * gaussian(1000, 4, seed=1))
    difference = frechet_difference(near, grouped(rows), reference, resamples=50)
    alone = frechet_figure(grouped(rows), reference, resamples=50)
    assert difference.high - difference.low < 1e-2 * (alone.high - alone.low)
    assert difference.low <= difference.value <= difference.high
    same = frechet_difference(grouped(rows), grouped(rows), reference, resamples=10)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_a_difference_of_sets_that_are_no_pairs_is_a_defect():
    with pytest.raises(ValueError, match="same images"):
        frechet_difference(
            grouped(gaussian(50)), grouped(gaussian(60)), Gaussian(np.zeros(5), np.eye(5)), resamples=5
        )


def test_figures_of_too_few_images_are_refused():
    reference = Gaussian(np.zeros(5), np.eye(5))
    with pytest.raises(TooFewSamples):
        frechet_figure(grouped(gaussian(5)), reference)
    with pytest.raises(TooFewSamples, match="two groups"):
        frechet_figure(grouped(gaussian(50), groups=1), reference)
    assert np.isfinite(frechet_figure(grouped(gaussian(5)), reference, allow_few=True, resamples=5).value)
