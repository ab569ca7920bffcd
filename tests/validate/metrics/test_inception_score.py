"""Inception Score: closed forms, an independent implementation, resampled groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddexport.runtime.errors import DDError
from ddexport.validate.metrics.inception_score import inception_score, resampled_scores


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


def test_agrees_with_torchmetrics():
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
