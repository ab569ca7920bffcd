"""Kernel distance: an independent implementation, the closed form, no bias, an honest standard error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddexport.validate.metrics.kernel_distance import kernel_distance, mmd
from ddexport.validate.statistics import TooFewSamples


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


def test_agrees_with_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    class Through(torch.nn.Module):
        num_features = 10

        def forward(self, x):
            return x[:, :, 0, 0].double()

    a, b = gaussian(80, 10), gaussian(80, 10, seed=1) * 1.3 + 0.4
    measure = KernelInceptionDistance(feature=Through(), subsets=1, subset_size=80, normalize=True)
    for rows, real in ((a, True), (b, False)):
        measure.update(torch.from_numpy(rows)[:, :, None, None], real=real)
    assert mmd(a, b) == pytest.approx(float(measure.compute()[0]), rel=1e-6)


def test_the_loop_over_pairs_is_the_definition():
    a, b = gaussian(4, 3), gaussian(5, 3, seed=1)

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert mmd(a, b) == pytest.approx(within_a + within_b - 2 * across)


def test_gaussians_in_one_dimension_have_a_closed_form():
    """x ~ N(0, 1), y ~ N(m, 1): E k(x, x') = 1 + 3, by the moments of a product of independent normals."""
    shift = 0.5
    moments = {1: shift, 2: shift**2 + 1, 3: shift**3 + 3 * shift}
    zero = {1: 0.0, 2: 1.0, 3: 0.0}

    def expected(p, q):
        return 1 + 3 * p[1] * q[1] + 3 * p[2] * q[2] + p[3] * q[3]

    truth = expected(zero, zero) + expected(moments, moments) - 2 * expected(zero, moments)
    found = kernel_distance(gaussian(20_000, 1), gaussian(20_000, 1, seed=1) + shift, 50, 400)
    assert found.value == pytest.approx(truth, abs=4 * found.standard_error)
    assert found.standard_error < 0.1 * truth


def test_there_is_no_bias_in_small_sets():
    values = [
        kernel_distance(gaussian(60, seed=2 * s), gaussian(60, seed=2 * s + 1)).value for s in range(60)
    ]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_the_standard_error_is_the_spread_of_repeated_measurements():
    sets = [(gaussian(400, seed=2 * s), gaussian(400, seed=2 * s + 1) + 0.3) for s in range(40)]
    found = [kernel_distance(*pair, subsets=20) for pair in sets]
    spread = np.std([one.value for one in found])
    claimed = np.mean([one.standard_error for one in found])
    assert 0.7 * spread < claimed < 2 * spread
    assert found[0].size == 200 and found[0].independent == 1


def test_small_subsets_of_a_large_set_claim_the_same_error():
    sets = [(gaussian(3000, seed=2 * s), gaussian(3000, seed=2 * s + 1) + 0.5) for s in range(20)]
    found = [kernel_distance(*pair, subsets=30, size=300) for pair in sets]
    spread = np.std([one.value for one in found])
    assert 0.7 * spread < np.mean([one.standard_error for one in found]) < 2 * spread
    assert found[0].independent == 9


def test_the_interval_is_about_two_standard_errors():
    found = kernel_distance(gaussian(2000), gaussian(2000, seed=1) + 0.3)
    figure = found.figure(resamples=1000)
    assert figure.value == found.value
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.3)


def test_subsets_repeat_no_row_and_use_all_before_any_twice():
    from ddexport.validate.metrics.kernel_distance import _order

    order = _order(50, 10, 8, np.random.default_rng(0))
    assert order.shape == (8, 10)
    assert sorted(order[:5].ravel()) == list(range(50))
    assert all(len(set(row)) == 10 for row in order)


def test_the_same_seed_gives_the_same_subsets():
    a, b = gaussian(100), gaussian(100, seed=1)
    assert kernel_distance(a, b, seed=3).value == kernel_distance(a, b, seed=3).value
    assert kernel_distance(a, b, seed=3).value != kernel_distance(a, b, seed=4).value


def test_too_few_rows_are_refused():
    with pytest.raises(TooFewSamples):
        kernel_distance(gaussian(3), gaussian(100))
    with pytest.raises(TooFewSamples, match="1000"):
        kernel_distance(gaussian(1500), gaussian(1500), size=1000)
    assert np.isfinite(kernel_distance(gaussian(4), gaussian(4, seed=1)).standard_error)
