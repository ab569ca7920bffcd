"""Inception Score: closed forms, an independent implementation, streaming, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddexport.validate.metrics.inception_score import ScoreSums, inception_score
from ddexport.validate.statistics import TooFewSamples


def softmax(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def probabilities(count, classes=7, seed=0):
    return softmax(2 * np.random.default_rng(seed).standard_normal((count, classes)))


def test_certain_and_balanced_is_the_number_of_classes_and_undecided_is_one():
    certain = np.eye(5)[np.arange(500) % 5 - (np.arange(500) // 5) % 5]
    assert inception_score(certain, 1).mean == pytest.approx(5)
    assert inception_score(np.full((100, 5), 0.2)).mean == pytest.approx(1)
    collapsed = np.tile([1.0, 0, 0], (60, 1))
    assert inception_score(collapsed).mean == pytest.approx(1)  # certain, and always the same


def test_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        num_features = 7

        def forward(self, x):
            return x[:, :, 0, 0].double()

    logits = 2 * np.random.default_rng(0).standard_normal((400, 7))
    measure = InceptionScore(feature=Logits(), splits=1)
    measure.update(torch.from_numpy(logits)[:, :, None, None])
    assert inception_score(softmax(logits), 1).mean == pytest.approx(float(measure.compute()[0]), rel=1e-6)


def test_splits_are_scores_of_their_own():
    p = probabilities(300)
    parts = [inception_score(p[s::3], 1).mean for s in range(3)]
    score = inception_score(p, 3)
    assert (score.mean, score.deviation) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))


def test_a_stream_in_any_order_and_batches_is_the_whole():
    p, order = probabilities(500), np.random.default_rng(1).permutation(500)
    whole, stream = ScoreSums(7), ScoreSums(7)
    whole.update(p, np.arange(500))
    for start in range(0, 500, 33):
        index = order[start : start + 33]
        stream.update(p[index].astype(np.float32), index)
        stream = ScoreSums.from_arrays(stream.to_arrays())
    assert stream.count == 500
    assert stream.score().mean == pytest.approx(whole.score().mean, rel=1e-6)
    assert whole.score().mean == pytest.approx(inception_score(p).mean)


def test_what_are_no_probabilities_is_refused():
    sums = ScoreSums(3)
    for wrong in (np.full((2, 3), 0.5), np.array([[1.5, -0.5, 0]]), np.full((2, 4), 0.25)):
        with pytest.raises(ValueError, match="probabilities"):
            sums.update(wrong, np.arange(len(wrong)))
    with pytest.raises(ValueError, match="probabilities"):
        sums.update(np.full((1, 3), np.nan), np.arange(1))


def test_splits_without_images_are_refused():
    with pytest.raises(TooFewSamples, match="5 images"):
        inception_score(probabilities(5), 10)
    with pytest.raises(ValueError, match="divide"):
        ScoreSums(3, 200).score(7)


def test_arrays_that_do_not_fit_are_refused():
    arrays = ScoreSums(3, 10).to_arrays()
    with pytest.raises(ValueError, match="counts"):
        ScoreSums.from_arrays({**arrays, "counts": np.zeros(9)})
    with pytest.raises(KeyError):
        ScoreSums.from_arrays({"counts": arrays["counts"]})
