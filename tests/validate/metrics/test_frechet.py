"""Frechet distance: closed forms, scipy's root, sets without full rank, moments of groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from ddexport.runtime.errors import DDError
from ddexport.validate.metrics import frechet as module
from ddexport.validate.metrics.frechet import FrechetTo, Gaussian, GroupedMoments, frechet
from ddexport.validate.metrics.frechet import gaussian as gaussian_fit


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
