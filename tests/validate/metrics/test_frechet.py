"""Frechet distance: closed forms, scipy's root, sets without full rank, intervals that hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from ddexport.runtime.errors import DDError
from ddexport.validate.bootstrap import figure
from ddexport.validate.metrics.frechet import FrechetTo, frechet_distance, gaussian_fit
from ddexport.validate.statistics import Gaussian, GroupedMoments, TooFewSamples


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


def interval(groups, reference, seed=0, resamples=50):
    """As `validate fid` composes it: the spread of rough distances of resampled groups."""
    to_reference, rng = FrechetTo(reference), np.random.default_rng(seed)
    drawn = [to_reference.rough_distance(groups.resample(rng)) for _ in range(resamples)]
    return figure(to_reference.distance(groups.total()), drawn)


def test_the_interval_covers_the_spread_of_repeated_draws():
    """95 % intervals of 60 sets against the mean over these: some must miss it, most must not."""
    reference = Gaussian(np.zeros(4), np.eye(4))
    figures = [interval(grouped(gaussian(400, 4, seed=s) * 1.3), reference, s, 100) for s in range(60)]
    truth = np.mean([one.value for one in figures])
    held = np.mean([one.low <= truth <= one.high for one in figures])
    assert 0.8 <= held < 1
    assert all(one.low < one.value < one.high for one in figures)


def test_the_bias_estimate_is_that_of_a_small_set():
    reference = Gaussian(np.zeros(6), np.eye(6))
    figures = [interval(grouped(gaussian(200, 6, seed=s), 50), reference) for s in range(10)]
    biases, values = [one.bias for one in figures], [one.value for one in figures]
    assert np.mean(biases) == pytest.approx(np.mean(values), rel=0.4)  # the true distance is 0: all is bias


def test_the_difference_of_paired_sets_is_known_far_better_than_either():
    """One draw of groups for both sets: what they share cancels."""
    to_reference = FrechetTo(Gaussian(np.zeros(4), np.eye(4)))
    rows = gaussian(1000, 4) * 1.2
    one, near = grouped(rows), grouped(rows + 1e-4 * gaussian(1000, 4, seed=1))
    rng = np.random.default_rng(0)
    draws = [one.multiplicities(rng) for _ in range(50)]
    first, second = (
        np.array([to_reference.rough_distance(groups.weighted(times)) for times in draws])
        for groups in (one, near)
    )
    assert np.std(first - second) < 1e-2 * np.std(first)
