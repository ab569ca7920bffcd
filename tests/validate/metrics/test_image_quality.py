"""Frechet distance, Inception Score, precision and recall: closed forms and independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy import linalg

from ddexport.runtime.errors import DDError
from ddexport.validate.metrics import frechet as module
from ddexport.validate.metrics import precision_recall as neighbours
from ddexport.validate.metrics.frechet import FrechetTo, Gaussian, GroupedMoments, frechet
from ddexport.validate.metrics.frechet import gaussian as gaussian_fit
from ddexport.validate.metrics.inception_score import inception_score, resampled_scores
from ddexport.validate.metrics.precision_recall import coverage, precision_recall, squared_distances


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


def frechet_distance(a, b):
    return FrechetTo(b).distance(a)


def by_scipy(a, b):
    """The published way: the root of an unsymmetric product."""
    root = linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


def test_diagonal_gaussians_have_a_closed_form():
    a = Gaussian(np.array([1.0, 0.0]), np.diag([4.0, 1.0]))
    b = Gaussian(np.array([0.0, 2.0]), np.diag([9.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 3) ** 2 + (1 - 0.5) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


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


def test_the_distance_agrees_with_torchmetrics():
    """An implementation that shares no code with this one, through features that pass straight through."""
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
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


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


def test_constant_features_are_no_obstacle_and_numbers_that_are_not_finite_an_error():
    still, good = Gaussian(np.ones(3), np.zeros((3, 3))), gaussian_fit(gaussian(50))
    assert frechet_distance(still, still) == 0
    assert frechet_distance(still, Gaussian(np.zeros(3), np.eye(3))) == pytest.approx(3 + 3)
    bad = Gaussian(np.full(5, np.nan), np.eye(5))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(DDError):
            frechet_distance(*pair)


def test_the_rough_distance_is_the_distance_where_rank_is_full():
    a, b = gaussian_fit(gaussian(100)), gaussian_fit(gaussian(100, seed=1) + 1)
    to_b = FrechetTo(b)
    assert to_b.rough_distance(a) == pytest.approx(to_b.distance(a), rel=1e-9)


def test_moments_are_those_of_all_rows_at_once(monkeypatch):
    """In blocks of any size, in double, and where sums of squares would lose the spread in a large mean."""
    for offset, block, kind in ((0, 7, np.float64), (1e6, 1000, np.float64), (0, 1000, np.float32)):
        monkeypatch.setattr(module, "BLOCK", block)
        rows = (gaussian(97) + offset).astype(kind)
        fit, double = gaussian_fit(rows), rows.astype(np.float64)
        np.testing.assert_allclose(fit.mean, double.mean(0), rtol=1e-12)
        tolerance = 1e-6 if offset else 1e-12
        np.testing.assert_allclose(fit.covariance, np.cov(double, rowvar=False), rtol=tolerance, atol=1e-9)
        assert fit.count == 97 and fit.covariance.dtype == np.float64


@pytest.mark.parametrize("groups", [6, 100])
def test_a_weighted_set_repeats_whole_groups(groups):
    """Group g is the images whose index is g modulo the number of groups; some may be empty."""
    rows = gaussian(60)
    moments = GroupedMoments.of(rows, groups)
    times = np.random.default_rng(0).integers(0, 4, groups)
    repeated = np.concatenate([np.repeat(rows[g::groups], n, axis=0) for g, n in enumerate(times)])
    fit = moments.weighted(times)
    assert fit.count == len(repeated)
    np.testing.assert_allclose(fit.mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(fit.covariance, np.cov(repeated, rowvar=False), rtol=1e-9)


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def probabilities(count, classes=7, seed=0):
    return softmax(2 * np.random.default_rng(seed).standard_normal((count, classes)))


def test_certain_and_balanced_is_the_number_of_classes_and_undecided_is_one():
    certain = np.eye(5)[np.arange(500) % 5 - (np.arange(500) // 5) % 5]
    assert inception_score(certain, 1) == pytest.approx(5)
    assert inception_score(np.full((100, 5), 0.2)) == pytest.approx(1)
    collapsed = np.tile([1.0, 0, 0], (60, 1))
    assert inception_score(collapsed) == pytest.approx(1)  # certain, and always the same


def test_the_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        num_features = 7

        def forward(self, x):
            return x[:, :, 0, 0].double()

    logits = 2 * np.random.default_rng(0).standard_normal((400, 7))
    measure = InceptionScore(feature=Logits(), splits=1)
    measure.update(torch.from_numpy(logits)[:, :, None, None])
    assert inception_score(softmax(logits), 1) == pytest.approx(float(measure.compute()[0]), rel=1e-6)


def test_resampled_scores_are_those_of_the_repeated_images(splits=5):
    """Groups are drawn inside each split, which stays together; a split has a score of its own."""
    p = probabilities(100)
    times = np.random.default_rng(0).integers(1, 4, (3, 20))
    for row, score in zip(times, resampled_scores(p, times, splits), strict=True):
        parts = [
            np.concatenate([np.repeat(p[g::20], row[g], axis=0) for g in range(split, 20, splits)])
            for split in range(splits)
        ]
        assert score == pytest.approx(np.mean([inception_score(part, 1) for part in parts]))


def test_float32_is_accepted_and_what_are_no_probabilities_is_refused():
    p = probabilities(500)
    assert inception_score(p.astype(np.float32)) == pytest.approx(inception_score(p), rel=1e-6)
    for wrong in (np.full((20, 3), 0.5), np.tile([1.5, -0.5, 0], (20, 1)), np.full((20, 3), np.nan)):
        with pytest.raises(ValueError):
            inception_score(wrong)
    with pytest.raises(DDError):
        inception_score(p[:5], 10)


def test_precision_and_recall_of_the_extremes():
    real = gaussian(300, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    few = np.tile(real[:1], (300, 1)) + gaussian(300, 4, seed=2) * 1e-6
    precision, recall = precision_recall(few, real)
    assert precision == 1.0 and recall < 0.05  # all good, all the same


def test_agrees_with_the_package_prdc(k=3):
    real, generated = gaussian(300, 8), gaussian(250, 8, seed=1) * 1.1 + 0.3
    theirs = compute_prdc(real_features=real, fake_features=generated, nearest_k=k)
    ours = precision_recall(generated, real, k)
    assert ours == (theirs["precision"], theirs["recall"])
    assert min(ours) > 0.3 and max(ours) < 1  # a case that could go wrong


def test_blocks_of_any_size_give_the_same(monkeypatch):
    real, generated = gaussian(130, 3), gaussian(90, 3, seed=1) * 2
    whole = coverage(generated, real)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    for part, all_at_once in zip(coverage(generated, real), whole, strict=True):
        assert (part == all_at_once).all()


def test_equal_points_are_at_distance_zero_however_large_they_are():
    """Differences of large squares are rounding; a collapsed set must still be equal to itself."""
    points = np.repeat(gaussian(10, 64) * 1e3, 5, axis=0)
    distances = squared_distances(points, points)
    assert (distances.reshape(10, 5, 10, 5)[np.arange(10), :, np.arange(10)] == 0).all()
    assert precision_recall(points, points) == (1.0, 1.0)


def test_sets_without_neighbours_are_refused():
    with pytest.raises(DDError):
        coverage(gaussian(3), gaussian(50))
    with pytest.raises(DDError):
        coverage(gaussian(50), gaussian(3))
