"""Labels and noise by image number, and the images both sides draw from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import load
from ddexport.runtime.text import TRIAL_TEXTS
from ddexport.validate.fid.draws import Order, by_pipeline, by_reference
from ddexport.validate.reference import build_reference
from ddexport.validate.runners import opened
from tests.goldens import TEXT

LENGTH, WIDTH = 6, 3


def order(images=40, seed=5, per_class=None):
    return Order(images, seed, classes=4, length=LENGTH, width=WIDTH, per_class=per_class)


def test_an_image_has_its_label_and_noise_whatever_the_batch():
    """A run that was stopped, and a run in other batches, draw the same images."""
    one = order()
    assert np.array_equal(one.labels(range(40))[17:23], one.labels(range(17, 23)))
    assert np.array_equal(one.noise(range(40))[17:23], one.noise(range(17, 23)))
    assert np.array_equal(one.noise(range(3)), gaussian_noise(5, range(3), LENGTH, WIDTH))


def test_labels_are_uniform_over_the_classes():
    """Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand seeds."""
    counts = np.bincount(order(40_000).labels(range(40_000)), minlength=4)
    assert len(counts) == 4
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 16.3
    assert not np.array_equal(order(seed=5).labels(range(40)), order(seed=6).labels(range(40)))


def test_labels_know_nothing_of_the_noise():
    """Both come from the seed: images of a class must not share a trait of their noise."""
    labels = order().labels(range(20_000))
    first = gaussian_noise(5, range(20_000), LENGTH, WIDTH)[:, 0, 0]
    means = np.array([first[labels == label].mean() for label in range(4)])
    assert np.abs(means).max() < 5 / np.sqrt(5_000)


def test_both_sides_draw_the_same_images_by_different_ways(embedded_bundle):
    """The pipeline that users call, and the reference's own loop; with what is not finite a failed
    verification."""
    bundle = embedded_bundle("digits-var")
    manifest = read_manifest(bundle)
    schedules = {1: (0,), 2: (0, 5)}
    size, indices = manifest.sequence, range(8, 14)
    order = Order(20, 3, manifest.classes, size.length, size.width)
    reference = build_reference(manifest, {}, threads=1)
    with load(bundle, "onnxruntime", threads=1) as pipe:
        drawn = by_pipeline(pipe, schedules)(order, indices)
        wanted = by_reference(reference, schedules)(order, indices)
        for steps in schedules:
            assert np.abs(drawn[steps].astype(int) - wanted[steps]).max() <= 1
        assert np.abs(drawn[1].astype(int) - drawn[2]).max() > 1
    with torch.no_grad():
        reference._tokenizer.decoder.conv_out.bias.fill_(np.nan)
    with pytest.raises(VerificationError, match="8 to 13"):
        by_reference(reference, schedules)(order, indices)


def test_both_sides_draw_the_same_images_from_texts(text_bundle):
    """A prompt is encoded once, in whatever order its images are drawn."""
    manifest = read_manifest(text_bundle)
    files = {**TEXT.files, "text_encoder": TEXT.folder / "t5-encoder"}
    reference = build_reference(manifest, files, threads=1)
    order = Order(20, 3, TRIAL_TEXTS, manifest.sequence.length, manifest.sequence.width)
    assert len(set(order.labels(range(8, 14)))) == 3
    with opened(text_bundle, manifest, "onnxruntime", threads=1) as pipe:
        drawn = by_pipeline(pipe, {2: (0, 5)})(order, range(8, 14))[2]
    wanted = by_reference(reference, {2: (0, 5)})(order, range(8, 14))[2]
    assert np.abs(drawn.astype(int) - wanted).max() <= 1
    assert np.abs(drawn.astype(int) - drawn[::-1]).max() > 1
