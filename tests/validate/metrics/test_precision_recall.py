"""Improved precision and recall: extremes, an independent implementation, blocks."""

from __future__ import annotations

import numpy as np
import pytest
from prdc import compute_prdc

from ddexport.runtime.errors import DDError
from ddexport.validate.metrics import precision_recall as module
from ddexport.validate.metrics.precision_recall import coverage, precision_recall, squared_distances


def gaussian(count, width=5, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


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
    monkeypatch.setattr(module, "BLOCK", 7)
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
